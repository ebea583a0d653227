"""The commands of Slurm that hvdlm uses: submit, requeue, ask for a job's end and state."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError

_TIMEOUT = 60  # seconds; Slurm's commands retry by themselves while slurmctld is not reachable


def submit(script: Path) -> str:
    """Submits a batch script and returns the job's number. Raises HvdlmError with sbatch's reason if it fails."""
    # --parsable prints "NUMBER" or, with several clusters, "NUMBER;CLUSTER".
    return _run("sbatch", "--parsable", str(script)).partition(";")[0]


def requeue(job: str) -> None:
    """Puts a running job back into the queue, which ends its processes. Raises HvdlmError if Slurm refuses."""
    _run("scontrol", "requeue", job)


def end_time(job: str) -> float:
    """When Slurm will end a running job, in seconds since 1970; infinity if it has no limit.

    The time changes if an administrator changes the limit or Slurm preempts the job. Raises HvdlmError if squeue fails.
    """
    answer = _run("squeue", "--noheader", "--jobs", job, "--format", "%e")
    return float(answer) if answer.isdigit() else float("inf")


def is_running(job: str) -> bool:
    """Whether a job may have running processes; False if Slurm does not know the job any more."""
    try:
        return bool(_run("squeue", "--noheader", "--jobs", job, "--states", "RUNNING,SUSPENDED,COMPLETING"))
    except HvdlmError:
        return False


def require(command: str) -> None:
    """Raises HvdlmError if Slurm's command `command` is not on the PATH."""
    if shutil.which(command) is None:
        raise HvdlmError(
            f"{command} is not on the PATH: run this where Slurm's commands are installed, as on a login node"
        )


def _run(command: str, *arguments: str) -> str:
    """Runs a command and returns its output. Raises HvdlmError if it is missing, fails or does not end in time."""
    require(command)
    words: Sequence[str] = [command, *arguments]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # seconds since 1970, whatever the time zone
    try:
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise HvdlmError(f"`{' '.join(words)}` has not answered in {_TIMEOUT} s: is slurmctld running?") from None
    if answer.returncode:
        reason = " ".join(answer.stderr.split()) or f"status {answer.returncode}"
        raise HvdlmError(f"`{' '.join(words)}` failed: {reason}")
    return answer.stdout.strip()
