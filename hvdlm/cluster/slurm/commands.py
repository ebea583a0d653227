"""The commands of Slurm that hvdlm uses: submit, requeue, ask for a job's end and state."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError

_TIMEOUT = 60  # seconds; Slurm's commands retry by themselves while slurmctld is not reachable

# What a process inside a job finds in its environment: what Slurm says of the job and of the step, and what launchers
# say to their ranks. Beginnings of names, and names.
_JOB_VARIABLES = (
    *("SLURM_", "SLURMD_", "SBATCH_", "PMI_", "PMIX_", "PRTE_", "OMPI_", "OPAL_USER_", "MPI_LOCAL", "HYDRA_", "HYDI_"),
    *("HOROVOD_LOCAL_", "HOROVOD_CROSS_", "HOROVOD_GLOO_RENDEZVOUS_", "TORCHELASTIC_"),
)
_JOB_NAMES = {
    *("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_HOSTNAME", "HOROVOD_ELASTIC", "HOROVOD_GLOO_IFACE"),
    *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
# Of these, what users set for all their jobs: how to reach Slurm, what a job is charged to, parameters of Open MPI.
_USER_VARIABLES = (
    *("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_"),
    *("SBATCH_ACCOUNT", "SBATCH_CLUSTERS", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION"),
    *("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT", "OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "OMPI_PREFIX"),
)
# Parameters that mpirun of Open MPI 4 and 5 gives its ranks, and that a mpirun of theirs would take for its own.
_RANK_PARAMETERS = (
    *("OMPI_MCA_ess", "OMPI_MCA_orte_", "OMPI_MCA_pmix", "OMPI_MCA_PREFIXES", "OMPI_MCA_initial_wdir"),
    *("OMPI_MCA_num_procs", "OMPI_MCA_cpu_type", "PRTE_MCA_ess", "PRTE_MCA_prte_ess"),
)


def submit(script: Path) -> str:
    """Submits a batch script and returns the job's number. Raises HvdlmError with sbatch's reason if it fails.

    The job gets this process's environment without what belongs to the job that this process may be in: srun would
    bind all ranks to the cores of that job, or refuse two ways of asking for memory, without a word of where they are
    from. sbatch also lets its variables win over the script: SBATCH_TIMELIMIT over the limit before which ranks save.
    """
    # --parsable prints "NUMBER" or, with several clusters, "NUMBER;CLUSTER".
    environment = outside_of_jobs(os.environ)
    return _run("sbatch", "--parsable", str(script), environment=environment).partition(";")[0]


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables by which Slurm and launchers tell a process of the job that it is in."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(_JOB_VARIABLES) or name in _JOB_NAMES)
        or (name.startswith(_USER_VARIABLES) and not name.startswith(_RANK_PARAMETERS))
    }


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


def _run(command: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> str:
    """Runs a command and returns its output. Raises HvdlmError if it is missing, fails or does not end in time."""
    require(command)
    words: Sequence[str] = [command, *arguments]
    variables = {**environment, "SLURM_TIME_FORMAT": "%s"}  # seconds since 1970, whatever the time zone
    try:
        answer = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise HvdlmError(f"`{' '.join(words)}` has not answered in {_TIMEOUT} s: is slurmctld running?") from None
    if answer.returncode:
        reason = " ".join(answer.stderr.split()) or f"status {answer.returncode}"
        raise HvdlmError(f"`{' '.join(words)}` failed: {reason}")
    return answer.stdout.strip()
