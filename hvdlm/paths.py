"""Paths as users write them in settings and options."""

from __future__ import annotations

import re
from pathlib import Path


def expand_path(text: str) -> str:
    """`text` with `~` or `~user` at its beginning replaced, which shells do not after `=`, and TOML never does.

    Raises ValueError for a user that is not there, and for a variable that no shell has replaced: a directory of that
    name is what nobody wants.
    """
    if variable := re.search(r"\$(\w+|\{\w+\})", text):
        raise ValueError(f"{text!r} holds {variable[0]}, which hvdlm does not replace: write the path itself")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise ValueError(f"{text!r} begins with the home of a user who is not there") from None
