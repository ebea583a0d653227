"""The JSON file with every figure that a benchmark leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError


def read_results(path: Path) -> dict[str, Any]:
    """Results by the name of their set-up; none if there is no file yet. Raises HvdlmError for one of another kind."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{path} holds no results of this benchmark: {error}; give another --output") from None
    if not isinstance(results, dict):
        raise HvdlmError(f"{path} holds no results of this benchmark: give another --output")
    return results


def write_results(path: Path, results: Mapping[str, Any] | Sequence[Any]) -> None:
    """Replaces the file whole or not at all."""
    write_text(path, json.dumps(results, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
