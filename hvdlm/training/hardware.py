"""Which device a rank computes on, and with how many threads."""

from __future__ import annotations

import os

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import TrainSection
from hvdlm.errors import HvdlmError


def choose_device(settings: TrainSection, local_rank: int) -> torch.device:
    """The GPU with this rank's number on its node, several ranks sharing one where there are too few; or the CPU."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HvdlmError("train.device = 'cuda', but PyTorch finds no GPU here: install its CUDA build, or set 'cpu'")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def share_cores(settings: TrainSection, communicator: Communicator) -> int:
    """Sets and returns the CPU threads: `train.threads`, else OMP_NUM_THREADS, else this rank's share of its cores.

    Ranks that a launcher has bound to cores of their own share them with nobody. Collective.
    """
    own = (communicator.hosts[communicator.rank], sorted(os.sched_getaffinity(0)))
    sharing = communicator.all_gather_object(own).count(own)
    threads = settings.threads or int(os.environ.get("OMP_NUM_THREADS") or max(1, len(own[1]) // sharing))
    torch.set_num_threads(threads)
    return threads
