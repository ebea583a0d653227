"""The cache of built wheels, Horovod's source and build logs, shared by all environments of a user."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvdlm.errors import HvdlmError

BUILD_BYTES = 2**30  # required free space; a build takes about 500 MiB: source 33, objects 283, tools 150


def open_cache() -> Path:
    """The cache directory, created if missing: `$HVDLM_CACHE`, else `$XDG_CACHE_HOME/hvdlm`, else `~/.cache/hvdlm`.

    Raises HvdlmError if it cannot be created or written.
    """
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache = Path(os.environ.get("HVDLM_CACHE") or user_cache / "hvdlm").expanduser().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise HvdlmError(
            f"cannot write to the cache directory {cache} ({error.strerror}): "
            "set HVDLM_CACHE to one that can be written"
        ) from None
    return cache


def cached_wheel(cache: Path, version: str) -> Path | None:
    """The wheel of this Horovod version, if the cache has a complete one."""
    return next((wheel for wheel in cache.glob(f"horovod-{version}-*.whl") if zipfile.is_zipfile(wheel)), None)


@contextmanager
def build_directory(cache: Path) -> Iterator[Path]:
    """An empty directory in the cache, removed afterwards. Only one process at a time uses it; others wait.

    Raises HvdlmError if the disk has too little space for a build.
    """
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        directory = cache / "build"
        shutil.rmtree(directory, ignore_errors=True)  # left by a killed process
        free = shutil.disk_usage(cache).free
        if free < BUILD_BYTES:
            raise HvdlmError(
                f"the disk of the cache directory {cache} has {free >> 20} MiB free and building Horovod takes "
                f"{BUILD_BYTES >> 20}: free some space, or set HVDLM_CACHE to a directory on a larger disk"
            )
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
