"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvdlm.errors import HvdlmError


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A directory beside `output` to write in; it is renamed to `output` when the block ends, or removed if it fails.

    What a killed process left there is cleared first. After a crash of the machine `output` is whole or absent: files
    and directories are on disk before the rename.

    Raises HvdlmError if another process is writing the same `output`, or if something cannot be written.
    """
    staging = output.with_name(f".{output.name}.preparing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        with (staging / "lock").open("w") as lock:
            _lock(lock.fileno(), output)
            try:
                _clear(staging)
                yield staging
                for path in (*staging.rglob("*"), staging):
                    make_durable(path)
                (staging / "lock").unlink()
                staging.rename(output)
                make_durable(output.parent)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as error:
        raise HvdlmError(f"cannot write {output}: {error}") from error


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HvdlmError(f"another `hvdlm prepare` is writing {output}; wait for it to end") from None
    except OSError:
        pass  # some cluster file systems have no locks


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def make_durable(path: Path) -> None:
    """Returns when a file's content, or a directory's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
