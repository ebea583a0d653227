"""Which device a rank computes on, with how many threads, and how much memory it has held."""

from __future__ import annotations

import ctypes
import os
import resource
import time
from collections.abc import Sequence

import psutil
import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.core_binding import drop_unchosen_threads, release_cores, warn_of_bindings
from hvdlm.comm.gpus import deal_gpus, shared_gpus, visible_gpus
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.cores import usable_cores
from hvdlm.errors import JobError

# mallopt's names of settings (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_MAX_NAMED_RANKS = 4


def device_type(wanted: str) -> str:
    """The device type, "cpu" or "cuda", that `train.device` = `wanted` selects."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def choose_device(wanted: str, communicator: Communicator) -> torch.device:
    """The device for "auto", "cpu" or "cuda": a GPU, this rank's own where there are as many, or the CPU. Collective.

    Where a node has fewer GPUs than ranks they share them, if the engine sends its messages through the host. Raises
    JobError on all ranks where only some find a GPU, or where one cannot compute: on CPUs and GPUs ranks would exchange
    different messages.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    visible = communicator.all_gather_object(visible_gpus())
    without = [rank for rank, gpus in enumerate(visible) if not gpus]
    if without and wanted == "auto" and len(without) == communicator.size:
        return torch.device("cpu")
    if without:
        raise JobError(_no_gpu(wanted, communicator, without))
    shared = shared_gpus(visible)
    if shared and communicator.supports("cuda"):
        ranks = next(iter(shared.values()))
        raise JobError(
            f"ranks {', '.join(map(str, ranks))} on {communicator.hosts[ranks[0]]} share one GPU, which NCCL refuses: "
            "start one rank a GPU, or set comm.engine = 'mpi'"
        )
    # One that is to join others does not see whom they compute on: the numbers of those are dealt by local rank, too
    is_new, own = communicator.is_new, visible[communicator.rank]
    number = communicator.local_rank % len(own) if is_new else deal_gpus(visible)[communicator.rank]
    device = torch.device("cuda", number)
    raise_on_all_ranks(communicator, communicator.all_gather_object(_use_gpu(device)))
    if communicator.engine == "horovod" and communicator.supports("cuda"):
        # Where Horovod's thread allocates what it gathers it waits for the default stream, and so for a backward pass
        # that runs there (horovod/torch/adapter_v2.cc, AllocateOutput)
        torch.cuda.set_stream(torch.cuda.Stream(device))
    return device


def _no_gpu(wanted: str, communicator: Communicator, without: Sequence[int]) -> str:
    if len(without) == communicator.size:
        return "train.device = 'cuda', but PyTorch finds no GPU here: install its CUDA build, or set 'cpu'"
    named = ", ".join(f"rank {rank} on {communicator.hosts[rank]}" for rank in without[:_MAX_NAMED_RANKS])
    more = f" and {len(without) - _MAX_NAMED_RANKS} more" if len(without) > _MAX_NAMED_RANKS else ""
    return (
        f"train.device = '{wanted}', and PyTorch finds a GPU on some ranks but none for {named}{more}: see what "
        "nvidia-smi says there, leave those hosts out, or set train.device = 'cpu'"
    )


def _use_gpu(device: torch.device) -> str | None:
    """Makes `device` the current one of this thread; returns why it cannot compute, or None."""
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        return f"GPU {device.index} cannot compute: {reason}; see who uses it by nvidia-smi, or leave out this host"
    return None


def gpu_uuid(device: torch.device) -> str:
    """The UUID of a GPU, by which ranks find out whether they share it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def share_cores(wanted: int, communicator: Communicator) -> int:
    """Sets and returns the CPU threads: `wanted` if above 0, else OMP_NUM_THREADS, else this rank's share of its cores.

    Ranks that a launcher has bound to different cores do not share them; a CPU quota that allows fewer is shared by all
    ranks of a host. Rank 0 warns where a launcher or OpenMP leaves cores of a host without work. Collective.
    """
    remark, bound_by = drop_unchosen_threads(os.environ), release_cores(os.environ)
    cores, usable = sorted(os.sched_getaffinity(0)), usable_cores()
    own = (communicator.hosts[communicator.rank], cores)
    sharing = communicator.all_gather_object(own).count(own)
    if usable < len(cores):
        sharing = communicator.local_size
    share = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else max(1, usable // sharing)
    threads = wanted or share
    torch.set_num_threads(threads)
    warn_of_bindings(communicator, bound_by, remark)
    return threads


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next step; by default it returns large blocks to the kernel at once.

    The kernel clears each page that it hands out: with a vocabulary of 50,000 tokens that took a third of the loss's
    time (benchmarks/LOG.md). Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU if it computes there, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def libraries_bytes(has_compiler: bool) -> int:
    """Host memory that this process holds before it has a model, with all libraries loaded that training loads.

    `has_compiler`: whether torch.compile's are among them.
    """
    if has_compiler:
        import torch._dynamo  # noqa: F401
    return int(psutil.Process().memory_info().rss)


def seconds_alive() -> float:
    """Since this process was started, imports and compilation included."""
    return time.time() - float(psutil.Process().create_time())
