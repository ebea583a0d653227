"""How this process was started, as environment variables say: by which launcher, as which rank of how many."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from hvdlm.errors import HvdlmError


@dataclass(frozen=True)
class Launch:
    """What the environment says of the job: its launcher, this process's rank and the number of ranks."""

    launcher: str  # "horovodrun", "mpirun", "srun", "flux", "jsrun", "torchrun", or "none": started by itself
    rank: int
    size: int


# Launchers by the variables that they set, the most specific first: horovodrun over mpirun leaves mpirun's too,
# and mpirun inside a Slurm job leaves Slurm's.
_VARIABLES = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("torchrun", "RANK", "WORLD_SIZE"),
)

# Ranks that were started together read the same file at most so many seconds apart, also where they wait for cores.
_SECONDS_FOR_RANK_0 = 10.0

# Ranks as launchers set them that do not say how many there are: prterun and other starters of PMIx, HPE's PALS and
# ALPS, Intel MPI, Open MPI, MVAPICH, PBS's pbsdsh.
_RANKS_WITHOUT_SIZE = (
    "PMIX_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
    "PMI_RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
    "FLUX_TASK_RANK",
    "JSM_NAMESPACE_RANK",
    "HOROVOD_RANK",
    "MPI_LOCALRANKID",
    "PBS_TASKNUM",
)


def detect(environment: Mapping[str, str]) -> Launch:
    """Reads the launcher, rank and size from environment variables; MPI itself is not touched.

    Raises HvdlmError if they are no rank and number of ranks, or if they say that there are others but not how many:
    such a process would take itself for a job of its own, as all others would.
    """
    # torchrun inside a Slurm step: Slurm counts the torchruns, not the ranks that they have started.
    variables = _VARIABLES[::-1] if "TORCHELASTIC_RUN_ID" in environment else _VARIABLES
    for launcher, rank, size in variables:
        if rank in environment and size in environment:
            if launcher == "srun" and not environment.get("PMIX_NAMESPACE", "slurm").startswith("slurm"):
                continue  # prterun inside a step of srun, whose variables are still there
            if environment.get("HOROVOD_CONTROLLER") == "mpi":
                launcher = "horovodrun"
            return Launch(launcher, *_rank_and_size(environment, rank, size))
    for rank in _RANKS_WITHOUT_SIZE:
        if rank in environment:
            raise HvdlmError(
                f"{rank}={environment[rank]} says that a launcher started this process as one of several ranks, but "
                "not of how many: start them with mpirun, horovodrun, srun or torchrun, or unset it to train alone"
            )
    return Launch("none", 0, 1)


def leave_word_to_rank_0(environment: Mapping[str, str]) -> None:
    """Gives rank 0 time to print an error that all ranks have found before they were connected, such as one of the
    settings. A launcher that ends the others when one ends does so before they print it again.
    """
    with suppress(HvdlmError):
        if detect(environment).rank > 0:
            time.sleep(_SECONDS_FOR_RANK_0)


def _rank_and_size(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    """The numbers in two variables. Raises HvdlmError if they are none, or do not fit each other."""
    texts = environment[rank], environment[size]
    if all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts) and int(texts[0]) < int(texts[1]):
        return int(texts[0]), int(texts[1])
    raise HvdlmError(
        f"{rank}={texts[0]} and {size}={texts[1]} are no rank and number of ranks: unset both to train alone, or leave "
        "them to the launcher"
    )
