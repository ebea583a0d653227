"""How this process was started, which engine it uses, and whether all ranks run the same software and settings."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hvdlm.comm.elastic_rendezvous import starts_elastically
from hvdlm.comm.launcher_process import watch_launcher
from hvdlm.comm.startup import exclude_guest_bridges, start_mpi
from hvdlm.errors import HvdlmError

if TYPE_CHECKING:
    from hvdlm.comm.communicator import Communicator

logger = logging.getLogger(__name__)


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


def _rank_and_size(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    """The numbers in two variables. Raises HvdlmError if they are none, or do not fit each other."""
    texts = environment[rank], environment[size]
    if all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts) and int(texts[0]) < int(texts[1]):
        return int(texts[0]), int(texts[1])
    raise HvdlmError(
        f"{rank}={texts[0]} and {size}={texts[1]} are no rank and number of ranks: unset both to train alone, or leave "
        "them to the launcher"
    )


def choose_engine(launch: Launch, requested: str) -> tuple[str, str]:
    """The engine to use and the reason, as a phrase that follows "because"."""
    if requested != "auto":
        return requested, "comm.engine says so"
    if launch.launcher == "none":
        return "solo", "no launcher started this process"
    if launch.launcher == "horovodrun":
        return "horovod", "horovodrun started this job"
    if launch.launcher == "torchrun":
        return "torch", "torchrun started this job"
    if not torch.cuda.is_available():
        return "mpi", f"{launch.launcher} started this job and it computes on CPUs"
    if _horovod_has_nccl():
        return "horovod", f"{launch.launcher} started this job on GPUs and Horovod is built with NCCL"
    return "torch", f"{launch.launcher} started this job on GPUs and Horovod is not built with NCCL"


def connect(engine: str, timeout: float, is_elastic: bool = False) -> Communicator:
    """Joins the job with an engine ("auto": the one that fits); `timeout`: seconds that a rank waits for another;
    `is_elastic`: whether ranks are to outlive others, where the launcher lets them.

    Raises HvdlmError on a rank that cannot, or that finds itself in another job than its launcher started.
    """
    launch = detect(os.environ)
    watch_launcher(launch)
    # With this, waits of Open MPI yield their core to processes that compute (a small all-reduce with more ranks than
    # cores: 14 ms instead of 100). Read by MPI_Init; the user's own setting wins.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # A segment of the ring (256 KiB) is sent eagerly over TCP, without the rendezvous protocol: while a rank computes,
    # its replies are late (benchmarks/LOG.md).
    for name in ("eager_limit", "rndv_eager_limit", "max_send_size"):
        os.environ.setdefault(f"OMPI_MCA_btl_tcp_{name}", str(320 * 1024))
    if launch.size > 1:
        exclude_guest_bridges(os.environ)
    # The choice depends on whether this rank finds a GPU, as the others may not
    is_free = engine == "auto" and launch.launcher in ("mpirun", "srun") and torch.backends.cuda.is_built()
    engine, reason = choose_engine(launch, engine)
    try:
        store = _agree(engine, launch, timeout) if is_free and launch.size > 1 else None
        communicator = _start(engine, launch, timeout, store, is_elastic)
    except (RuntimeError, ImportError, OSError) as error:  # each library has errors of its own; these are their bases
        reason = str(error).strip().partition("\n")[0]
        raise HvdlmError(
            f"rank {launch.rank} on {socket.gethostname()} cannot start engine {engine}: {reason}"
        ) from error
    if communicator.size != launch.size and not communicator.is_new:
        raise HvdlmError(
            f"{launch.launcher} started {launch.size} ranks and this is rank {launch.rank} on {socket.gethostname()}, "
            f"but engine {engine} sees {communicator.size} and takes itself for rank {communicator.rank}: "
            f"{_size_remedy(engine)}"
        )
    if communicator.rank == 0 and not communicator.is_new:
        logger.info("engine %s, because %s", engine, reason)
    return communicator


def _agree(engine: str, launch: Launch, timeout: float) -> Any:
    """The store of all ranks, once it is known that they start the same engine."""
    from hvdlm.comm.engine_agreement import check_engines_match
    from hvdlm.comm.rendezvous import rendezvous

    store = rendezvous(launch.launcher, launch.rank, launch.size, timeout)
    check_engines_match(store, launch.rank, launch.size, engine)
    return store


def _start(engine: str, launch: Launch, timeout: float, store: Any, is_elastic: bool) -> Communicator:
    # An engine's module is imported only where it is used: importing mpi4py starts MPI.
    if engine == "solo":
        from hvdlm.comm.solo import SoloCommunicator

        return SoloCommunicator()
    if engine == "mpi":
        return start_mpi(launch.rank, timeout)
    if engine == "horovod":
        if importlib.util.find_spec("horovod") is None:
            raise HvdlmError("engine horovod needs Horovod, which is not installed: run `hvdlm install-horovod`")
        if is_elastic and starts_elastically(os.environ):
            from hvdlm.comm.elastic_tcp import ElasticTcpCommunicator

            return ElasticTcpCommunicator(timeout)
        from hvdlm.comm.horovod import HorovodCommunicator

        return HorovodCommunicator.start(launch.rank, timeout)
    from hvdlm.comm.rendezvous import rendezvous
    from hvdlm.comm.torch import TorchCommunicator

    store = store or rendezvous(launch.launcher, launch.rank, launch.size, timeout)
    return TorchCommunicator.start(store, launch.rank, launch.size, timeout)


def _horovod_has_nccl() -> bool:
    if importlib.util.find_spec("horovod") is None:
        return False
    from horovod.common.util import nccl_built

    return bool(nccl_built())


def _size_remedy(engine: str) -> str:
    if engine == "mpi":
        from mpi4py import MPI

        library = MPI.Get_library_version().splitlines()[0].strip().rstrip(",")
        return f"mpi4py has loaded {library}; start the job with the mpirun of that MPI, or with srun --mpi=pmix"
    if engine == "solo":
        return "leave comm.engine at auto, or start one process"
    return "start the job with one launcher only, and build the engine for its MPI"
