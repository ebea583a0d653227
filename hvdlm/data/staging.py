"""Writes a directory atomically: it appears complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvdlm.errors import HvdlmError


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A staging directory beside `output`; it is renamed to `output` at the end of the block, or removed on an error.

    Files that a killed process left in it are deleted first. All files and directories are synced to disk before the
    rename, so that even after a crash of the machine `output` is complete or absent. `output` may be an empty
    directory, or a symbolic link to what is not there or to an empty directory: the link stays.

    Raises HvdlmError if another process is writing the same `output`, or if something cannot be written; at the
    beginning of the block if `output` could not be replaced at its end.
    """
    name = output
    try:
        output = _target(output)
        staging = output.with_name(f".{output.name}.preparing")
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        with (staging / "lock").open("w") as lock:
            _lock(lock.fileno(), name)
            try:
                _clear(staging)
                _try_to_replace(output, staging)
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
        raise HvdlmError(f"cannot write {name}: {error}") from error


def _target(output: Path) -> Path:
    """`output` without symbolic links. Raises OSError or HvdlmError if it can be no directory of its own."""
    try:
        target = output.resolve()
    except RuntimeError:  # before Python 3.13; later versions return a link
        target = output
    if target.is_symlink():
        raise OSError("its symbolic links lead in a circle")
    # What a disk that is not mounted leaves behind: the data set would be written where it was to be mounted
    for link in (output, *output.parents):
        needed = target.parent if link == output else link.resolve()
        if link.is_symlink() and not needed.is_dir():
            raise HvdlmError(
                f"{link} is a symbolic link, but there is no directory {needed}; make it, mount it, or remove the link"
            )
    if target in (Path.cwd(), Path(target.anchor)):
        raise HvdlmError(f"{output} is the current directory or the root: name a directory to be made within it")
    return target


def _try_to_replace(output: Path, staging: Path) -> None:
    """Replaces an empty directory `output` by another one, as will be done at the end. Raises HvdlmError if it fails.

    That a mount point, such as a volume in a container, cannot be replaced is then known before any work is done.
    """
    if not output.is_dir():
        return
    other = staging / "empty"
    other.mkdir()
    shutil.copystat(output, other)
    try:
        other.rename(output)
    except OSError as error:
        other.rmdir()
        raise HvdlmError(
            f"{output} cannot be replaced ({error.strerror}), as where a disk or volume is mounted; "
            f"name a directory to be made within it, such as {output / 'data'}"
        ) from None


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HvdlmError(f"another process is writing {output}; wait for it to end") from None
    except OSError:
        pass  # some cluster file systems do not support locks


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def refuse_what_is_there(output: Path) -> None:
    """Raises HvdlmError if `output` is there and no empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise HvdlmError(f"{output} is there already: remove it, or name another directory")


def let_others_read(directory: Path, like: Path) -> None:
    """Gives the safetensors files in and below a directory the mode of another file: the library lets nobody but their
    owner read them (its issue 782)."""
    for file in directory.rglob("*.safetensors"):
        shutil.copymode(like, file)


def make_durable(path: Path) -> None:
    """Syncs a file's content, or a directory's entries, to disk, so that they survive a power failure.

    Some file systems (CIFS, FUSE) cannot sync directories; there they are as durable as they can be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)
