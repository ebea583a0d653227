"""Why a file of a data set cannot be read, where that is not the file's contents: limits, permissions, disks."""

from __future__ import annotations

import errno
import os
import re
import resource
from pathlib import Path

from hvdlm.errors import HvdlmError

# May be over the next moment: a server of a network file system that has been restarted, a disk that answers late.
TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO})

OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})

_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
_DISK = TRANSIENT | {errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}

# Others may come from damaged contents: HDF5 reads at an offset that it finds in the file, and gets EINVAL.
_OBSTACLES = _DISK | OUT_OF_DESCRIPTORS | _FORBIDDEN | _GONE | {errno.ENOMEM}


class UnreadableFileError(HvdlmError):
    """The system does not let this process read a file, whatever its contents: these may be as they were written."""

    def __init__(self, sentence: str, is_gone: bool = False) -> None:
        """`is_gone`: there is no such file any more."""
        super().__init__(sentence)
        self.is_gone = is_gone


def error_number(error: Exception) -> int | None:
    """The number of the system's error (errno) behind an exception of Python or h5py; None if there is none.

    h5py raises some of HDF5's errors without the number, as KeyError or RuntimeError too, and with it in the text.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"\berrno = (\d+)", str(error))
    return int(match[1]) or None if match else None


def unreadable(path: Path, error: Exception) -> UnreadableFileError | None:
    """The error to raise where the system did not let `path` be read; None if the error is one of its contents."""
    number = error_number(error)
    if number not in _OBSTACLES:
        return None
    sentence = f"{path} cannot be read: {os.strerror(number)}; {_remedy(number)}"
    return UnreadableFileError(sentence, is_gone=number in _GONE)


def _remedy(number: int) -> str:
    if number in _FORBIDDEN:
        return f"let user {os.geteuid()}, who runs this, read it and search the directories above it (chmod, chown)"
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process may have {limit} files open: raise that with `ulimit -n`"
    if number == errno.ENFILE:
        return "this host has as many files open as it may (fs.file-max): close some, or raise that"
    if number == errno.ENOMEM:
        return "this host's memory is full: start fewer ranks on it"
    if number in _GONE:
        return "it was moved or deleted, or its file system is not mounted here"
    return "that is an error of the disk or the network file system (see dmesg), the file itself may be whole"


LFS_POINTER = "is a Git LFS pointer, not the file: run `git lfs pull`"


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file is what a clone without git-lfs has in place of a large one."""
    return content.startswith(b"version https://git-lfs.github.com/spec/")
