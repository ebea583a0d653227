"""Ends launchers that outlive their job: `python -m hvdlm.comm.launcher_end SECONDS PID...`.

mpirun that has lost the way to a host waits for that host's daemon for ever, though all ranks have ended (PRRTE 3.0, of
Open MPI 5.0). So ranks that give up leave this process behind.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil


def end_later(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Starts a process of its own that kills `processes` and all that they have started, unless they end within
    `seconds`.
    """
    if processes:
        words = [sys.executable, "-m", __name__, str(seconds), *(str(each.pid) for each in processes)]
        nothing = subprocess.DEVNULL  # the launcher waits until all that its ranks have inherited is closed
        with suppress(OSError):
            subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def _main(seconds: str, *pids: str) -> None:
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(pid)))
    _, alive = psutil.wait_procs(processes, timeout=float(seconds))
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            for each in [*process.children(recursive=True), process]:  # its sessions of ssh
                each.kill()


if __name__ == "__main__":
    _main(*sys.argv[1:])
