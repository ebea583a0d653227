"""`python -m hvdlm.cluster.slurm.ignore_sigterm COMMAND...` runs a command and protects it from Slurm's SIGTERM.

At scancel or preemption Slurm sends SIGTERM to the tasks of every job step. The daemons that mpirun starts on the other
nodes (prted) are such tasks, and at SIGTERM a daemon kills its ranks at once. Run by this program, a daemon ends only
when mpirun ends it, after all ranks have saved, or at Slurm's SIGKILL. job.sh sets this program as the launch agent.
"""

from __future__ import annotations

import signal
import subprocess
import sys


def main() -> int:
    """Runs the command in a session of its own and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by the daemon and its ranks
    status = subprocess.run(sys.argv[1:], start_new_session=True).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
