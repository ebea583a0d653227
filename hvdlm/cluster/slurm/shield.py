"""`python -m hvdlm.cluster.slurm.shield COMMAND...`: keeps Slurm's SIGTERM from the MPI daemon of a node.

At scancel or preemption Slurm sends SIGTERM to the tasks of every step. mpirun's daemons on the other nodes (prted) are
such tasks, and the first thing that they do is to kill their ranks. Behind a shield they end when mpirun says so, which
is once all ranks have saved, or with Slurm's SIGKILL.
"""

from __future__ import annotations

import signal
import subprocess
import sys


def main() -> int:
    """Runs the command in a session of its own, and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, not inherited by the daemon and its ranks
    status = subprocess.run(sys.argv[1:], start_new_session=True).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
