"""Which GPU each rank computes on.

Ranks of one host may see all of its GPUs, one each, as `srun --gpus-per-task=1` arranges it, or the same ones in
different orders. So GPUs are told apart by UUID, never by the number that a rank has for them.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees, by its numbers for them; none where PyTorch cannot use them."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
    except RuntimeError as error:  # a driver that is broken, or older than PyTorch's CUDA
        reason = str(error).strip().partition("\n")[0]
        logger.warning("PyTorch cannot use the GPUs of %s: %s", socket.gethostname(), reason)
        return []


def deal_gpus(visible: Sequence[Sequence[str]]) -> list[int]:
    """Each rank's number for the GPU that it is to compute on; `visible[r]`: what rank r sees, one at least.

    Ranks that see fewest choose first, then in the order of ranks; each takes the first of those that fewest have.
    """
    taken: Counter[str] = Counter()
    numbers = [0] * len(visible)
    for rank in sorted(range(len(visible)), key=lambda rank: len(visible[rank])):
        own = visible[rank]
        numbers[rank] = min(range(len(own)), key=lambda number: taken[own[number]])
        taken[own[numbers[rank]]] += 1
    return numbers


def shared_gpus(visible: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """The GPUs on which more than one rank computes, as `deal_gpus` deals them, and those ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, (own, number) in enumerate(zip(visible, deal_gpus(visible), strict=True)):
        ranks.setdefault(own[number], []).append(rank)
    return {gpu: sharing for gpu, sharing in ranks.items() if len(sharing) > 1}
