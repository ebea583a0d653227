"""Gives all ranks the same parameters, and checks that they still have them."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, Work
from hvdlm.errors import JobError

# Bytes that are broadcast at once, and how many such pieces are under way. An engine that cannot reach a GPU stages
# them in pinned memory, which PyTorch keeps for ever: all parameters at once would hold as much of it as they have.
_PIECE = 16 * 2**20
_PIECES_UNDER_WAY = 2


@torch.no_grad()
def broadcast_tensors(communicator: Communicator, tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by rank 0's, a piece at a time. Collective.

    On a GPU it returns when all have arrived: a rank that has died is noticed here.
    """
    under_way: deque[Work[Tensor]] = deque()
    device = torch.device("cpu")
    for piece in _pieces(tensors):
        device = piece.device
        if len(under_way) == _PIECES_UNDER_WAY:
            under_way.popleft().wait()
        under_way.append(communicator.broadcast_async_(piece, root=0))
    for work in under_way:
        work.wait()
    communicator.arrival(device).wait()


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.nbytes > _PIECE:
            yield from tensor.detach().view(-1).split(_PIECE // tensor.element_size())
        else:
            yield tensor


def parameter_hash(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names and bytes of the parameters."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_replicas(communicator: Communicator, parameters: Mapping[str, Tensor], step: int) -> None:
    """Raises JobError on every rank, naming those that differ from most, unless all hold equal parameters."""
    communicator.arrival(next(iter(parameters.values())).device).wait()  # what the hash reads
    hashes = communicator.all_gather_object(parameter_hash(parameters))
    most_common, count = Counter(hashes).most_common(1)[0]
    if count == communicator.size:
        return
    different = ", ".join(f"{r} on {communicator.hosts[r]}" for r, each in enumerate(hashes) if each != most_common)
    raise JobError(
        f"after step {step} the parameters of rank {different} differ from those of the other ranks: gradients were "
        "not combined alike, or memory was damaged; check those hosts and resume from a checkpoint"
    )
