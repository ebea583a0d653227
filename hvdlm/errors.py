"""The exceptions that are meant for the user rather than for a developer, and sentences of theirs that recur."""

import errno
import importlib.util


class HvdlmError(Exception):
    """What went wrong, where, and what to do about it, in one sentence.

    The command line prints the sentence and exits non-zero on every rank; any
    other exception that escapes is a bug and keeps its traceback.
    """


class JobError(HvdlmError):
    """An error that every rank of a job raises at the same place, so that one rank can speak for all."""


_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EACCES: "give yourself the permission",
    errno.EPERM: "give yourself the permission",
    errno.EROFS: "choose a file system that can be written",
    errno.EFBIG: "raise the limit of file sizes, ulimit -f",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
}


def check_installed(module: str, wanted_by: str, library: str, extra: str) -> None:
    """Raises HvdlmError if a library of an extra is missing; `wanted_by` begins the sentence."""
    if importlib.util.find_spec(module) is None:
        raise HvdlmError(f"{wanted_by} needs {library}, which is not installed: pip install 'hvdlm[{extra}]'")


def write_failure(error: OSError) -> str:
    """Why a file could not be written, and the remedy where there is one, as the end of a sentence."""
    reason = str(error.strerror or error)
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{reason}; {remedy}" if remedy else reason
