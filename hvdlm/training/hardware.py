"""Which device a rank computes on, with how many threads, and how much memory it has held."""

from __future__ import annotations

import ctypes
import os
import resource
import time

import psutil
import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.core_binding import drop_unchosen_threads, release_cores, warn_of_bindings
from hvdlm.errors import HvdlmError

# mallopt's names of settings (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def device_type(wanted: str) -> str:
    """The device type, "cpu" or "cuda", that `train.device` = `wanted` selects."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def choose_device(wanted: str, communicator: Communicator) -> torch.device:
    """The device for "auto", "cpu" or "cuda": the GPU with this rank's number on its node, or the CPU.

    Where a node has fewer GPUs than ranks they share them, if the engine sends its messages through the host.
    """
    if device_type(wanted) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HvdlmError("train.device = 'cuda', but PyTorch finds no GPU here: install its CUDA build, or set 'cpu'")
    gpus, ranks = torch.cuda.device_count(), communicator.local_size
    if ranks > gpus and communicator.supports("cuda"):
        raise HvdlmError(
            f"{ranks} ranks on {communicator.hosts[communicator.rank]} share {gpus} GPUs, which NCCL refuses: "
            "start one rank a GPU, or set comm.engine = 'mpi'"
        )
    device = torch.device("cuda", communicator.local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def share_cores(wanted: int, communicator: Communicator) -> int:
    """Sets and returns the CPU threads: `wanted` if above 0, else OMP_NUM_THREADS, else this rank's share of its cores.

    Ranks that a launcher has bound to different cores do not share them. Rank 0 warns where that or OpenMP leaves cores
    of a host without work. Collective.
    """
    remark, bound_by = drop_unchosen_threads(os.environ), release_cores(os.environ)
    own = (communicator.hosts[communicator.rank], sorted(os.sched_getaffinity(0)))
    sharing = communicator.all_gather_object(own).count(own)
    share = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else max(1, len(own[1]) // sharing)
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


def libraries_bytes() -> int:
    """Host memory that this process holds before it has a model, with all libraries loaded that training loads."""
    weight = torch.zeros(1)
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], fused=True).step()  # imports further libraries
    return int(psutil.Process().memory_info().rss)


def seconds_alive() -> float:
    """Since this process was started, imports and compilation included."""
    return time.time() - float(psutil.Process().create_time())
