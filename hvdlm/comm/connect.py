"""Joins the job: chooses the engine that fits how this process was started, and starts it."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import torch

from hvdlm.comm.elastic_rendezvous import starts_elastically
from hvdlm.comm.launch import Launch, detect
from hvdlm.comm.launcher_process import watch_launcher
from hvdlm.comm.startup import exclude_guest_bridges, start_mpi
from hvdlm.errors import HvdlmError

if TYPE_CHECKING:
    from hvdlm.comm.communicator import Communicator

logger = logging.getLogger(__name__)


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


def connect(engine: str, timeout: float, is_elastic: bool = False, engine_sums: bool = True) -> Communicator:
    """Joins the job with an engine ("auto": the one that fits); `timeout`: seconds that a rank waits for another;
    `is_elastic`: whether ranks are to outlive others, where the launcher lets them; `engine_sums`: whether gradients
    may be left to the engine's own all-reduce.

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
        communicator = _start(engine, launch, timeout, store, is_elastic, engine_sums)
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


def _start(
    engine: str, launch: Launch, timeout: float, store: Any, is_elastic: bool, engine_sums: bool
) -> Communicator:
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

        return HorovodCommunicator.start(launch.rank, timeout, engine_sums)
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
