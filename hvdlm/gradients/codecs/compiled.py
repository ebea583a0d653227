"""Loops compiled by Numba for the CPU, kept from start to start where there is a directory to keep them in.

Numba keeps compiled code beside the source file or below the user's home, refuses to decorate a function where it can
write to neither, and raises what reading or writing its files raises. A cache saves seconds and decides nothing else:
where it fails, the code is compiled again. Numba notices when the file of a function has changed; here a change of any
file in its folder counts, since a loop may call those of other files.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

logger = logging.getLogger(__name__)

# What a cache raises that is on a full disk, or that a crash or another version has left damaged.
_CACHE_ERRORS = (OSError, EOFError, pickle.PickleError, ValueError, AttributeError, ImportError, KeyError)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function by `numba.njit` with `options`, without the GIL: the backward pass runs at
    the same time."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        try:
            # What cache=True does with Numba's own class
            dispatcher._cache = _Cache(function)
        except (RuntimeError, OSError) as error:
            logger.debug("%s", error)
        return dispatcher

    return decorate


def cache_problem() -> str | None:
    """Why Numba keeps no compiled code of this package here; None if it does."""
    try:
        FunctionCache(cache_problem)  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError):
        return "Numba can write to neither the directory of the package nor NUMBA_CACHE_DIR nor the user's cache"
    return None


@lru_cache
def _folder_stamp(folder: Path) -> str:
    """What changes with any module in a folder."""
    digest = hashlib.sha256()
    for module in sorted(folder.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


class _Cache(FunctionCache):
    """Numba's cache of a function, but that it depends on all modules in the function's folder, and that what goes
    wrong with its files counts as not being there."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        stamp = _folder_stamp(Path(function.__code__.co_filename).parent)
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, stamp)  # type: ignore[no-untyped-call]

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except _CACHE_ERRORS as error:
            logger.debug("cannot read a compiled function: %s", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except _CACHE_ERRORS as error:
            logger.debug("cannot keep a compiled function: %s", error)
