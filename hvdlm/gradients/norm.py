"""The norm of all gradients together.

Each rank takes that of its part of every bucket, once it has the sums, and all gather those. So the result is equal on
all ranks, bit for bit, also where their processors add in different orders; and whoever has it knows that all ranks
have the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator


def global_norm(sums: Sequence[Tensor], communicator: Communicator) -> Tensor:
    """Euclidean norm of tensors that are equal on all ranks, a float32 scalar on their device. Collective."""
    own = _norm_of_part(sums, communicator)
    return own if communicator.size == 1 else _norm_of_ranks(own, communicator)


def global_norm_and_numbers(
    sums: Sequence[Tensor], numbers: Tensor, communicator: Communicator
) -> tuple[Tensor, Tensor]:
    """`global_norm`, and in the same message `numbers`, (k,) float64 on the CPU, of all N ranks: (N, k). Collective.

    The host waits for a GPU.
    """
    own = _norm_of_part(sums, communicator)
    message = torch.cat([own.reshape(1).cpu().double(), numbers])
    # As whole numbers of 64 bits, which every engine sends
    gathered = communicator.all_gather(message.view(torch.int64)).view(torch.float64)
    norm = own if communicator.size == 1 else _norm_in_order(gathered[:, 0]).to(own.device)
    return norm, gathered[:, 1:]


def norm_of_parts(own: Sequence[Tensor], communicator: Communicator) -> Tensor:
    """Euclidean norm of what all ranks own together, a float32 scalar on their device. Collective."""
    return _norm_of_ranks(_norm(own), communicator)


def _norm_of_ranks(own: Tensor, communicator: Communicator) -> Tensor:
    """Of what all ranks have together, of which `own` is this one's norm. Collective."""
    norms = communicator.all_gather(own.reshape(1)).flatten()
    # On GPUs, which are all of one model, without waiting for them
    return _norm([norms]) if norms.is_cuda else _norm_in_order(norms)


def _norm_of_part(sums: Sequence[Tensor], communicator: Communicator) -> Tensor:
    return _norm([each.tensor_split(communicator.size)[communicator.rank] for each in sums])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of tensors together, a scalar of their dtype on their device."""
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def _norm_in_order(norms: Tensor) -> Tensor:
    """Of (n,) norms on the CPU, added in one order, whatever the processor."""
    return torch.tensor(math.sqrt(math.fsum(n * n for n in norms.tolist())))
