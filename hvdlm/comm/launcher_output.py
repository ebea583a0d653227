"""Under horovodrun rank 0 prints where horovodrun does, without the `[1,0]<stderr>:` that it puts before each line."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hvdlm.comm.launch import Launch
from hvdlm.comm.launcher_process import first_launcher_process, launcher_processes

# With which the user has chosen a file for each rank
_OPTION = "output-filename"


def print_as_launcher(launch: Launch) -> None:
    """Leads stdout and stderr of rank 0 to those of horovodrun, if these are on this host and a terminal or a pipe.

    Two that open a regular file have each a position in it, and overwrite each other.
    """
    if launch.launcher != "horovodrun" or launch.rank:
        return
    process = first_launcher_process()
    if process is None or any(_OPTION in word for word in process.cmdline()):
        return
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        with suppress(OSError):
            if _is_read_by_launcher(number):
                _lead(number, Path(f"/proc/{process.pid}/fd/{number}"))


def _is_read_by_launcher(number: int) -> bool:
    """Whether a file descriptor leads to the launcher, and not to where a user has led it in the meantime."""
    if os.isatty(number):
        return True  # MPI's launchers may use terminals of their own
    own = Path(f"/proc/self/fd/{number}").readlink()
    return own.name.startswith("pipe:") and any(own in _open_files(process.pid) for process in launcher_processes())


def _open_files(process: int) -> Iterator[Path]:
    """What a process has open; without what it closes meanwhile, as a launcher does that answers its ranks."""
    with suppress(OSError):
        for each in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                yield each.readlink()


def _lead(number: int, path: Path) -> None:
    """Makes a file descriptor of this process the same as one of another."""
    is_pipe = stat.S_ISFIFO(path.stat().st_mode)
    opened = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)  # a pipe whose reader has gone would wait for one
    try:
        if is_pipe or os.isatty(opened):
            os.set_blocking(opened, True)
            os.dup2(opened, number)
    finally:
        os.close(opened)
