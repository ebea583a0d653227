"""What hvdlm asks of Slurm: to submit, to requeue, when a job ends, whether it is running."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError

# Seconds; Slurm's commands retry by themselves while the controller is away.
_PATIENCE = 60


def submit(script: Path) -> str:
    """Submits a batch script and returns the job's number. Raises HvdlmError with sbatch's reason if it refuses."""
    # --parsable: "NUMBER" or, on a federation, "NUMBER;CLUSTER"
    return _ask("sbatch", "--parsable", str(script)).partition(";")[0]


def requeue(job: str) -> None:
    """Puts a running job back into the queue, which ends its processes. Raises HvdlmError if Slurm refuses."""
    _ask("scontrol", "requeue", job)


def end_time(job: str) -> float:
    """When Slurm will end a running job, in seconds since 1970; infinity if it has no limit.

    Moves if an administrator changes the limit or the job is being preempted. Raises HvdlmError if Slurm does not say.
    """
    answer = _ask("squeue", "--noheader", "--jobs", job, "--format", "%e")
    return float(answer) if answer.isdigit() else float("inf")


def is_running(job: str) -> bool:
    """Whether a job's processes may be there; False for one that Slurm does not know any more."""
    try:
        return bool(_ask("squeue", "--noheader", "--jobs", job, "--states", "RUNNING,SUSPENDED,COMPLETING"))
    except HvdlmError:
        return False


def require(command: str) -> None:
    """Raises HvdlmError unless `command`, of Slurm, is there."""
    if shutil.which(command) is None:
        raise HvdlmError(f"{command} is not on the PATH: do this where Slurm's commands are, on a login node")


def _ask(command: str, *arguments: str) -> str:
    require(command)
    words: Sequence[str] = [command, *arguments]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # seconds since 1970, whatever the time zone
    try:
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise HvdlmError(f"`{' '.join(words)}` has not answered in {_PATIENCE} s: is slurmctld running?") from None
    if answer.returncode:
        reason = " ".join(answer.stderr.split()) or f"status {answer.returncode}"
        raise HvdlmError(f"`{' '.join(words)}` failed: {reason}")
    return answer.stdout.strip()
