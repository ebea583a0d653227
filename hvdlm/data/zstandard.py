"""Zstandard: Python's own from 3.14 on, before that its backport, which comes with `pip install hvdlm[data]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError

zstd: Any = None
try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    pass

ERRORS: tuple[type[Exception], ...] = (zstd.ZstdError,) if zstd else ()  # of damaged files


def require_zstandard(path: Path) -> None:
    """Raises HvdlmError if `path` cannot be read because the library is not installed."""
    if zstd is None:
        raise HvdlmError(f"{path} is compressed with Zstandard: pip install 'hvdlm[data]'")
