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
def broadcast_tensors(communicator: Communicator, tensors: Iterable[Tensor], root: int = 0) -> None:
    """Replaces each tensor by that of rank `root`, a piece at a time. Collective.

    On a GPU it returns when all have arrived: a rank that has died is noticed here.
    """
    under_way: deque[Work[Tensor]] = deque()
    device = torch.device("cpu")
    for piece in _pieces(tensors):
        device = piece.device
        if len(under_way) == _PIECES_UNDER_WAY:
            under_way.popleft().wait()
        under_way.append(communicator.broadcast_async_(piece, root))
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
    different, _ = _different_from_most(communicator, parameters)
    if different:
        raise JobError(
            f"after step {step} the parameters of rank {different} differ from those of the other ranks: gradients "
            "were not combined alike, or memory was damaged; check those hosts and resume from a checkpoint, or set "
            "train.heal_replicas"
        )


def heal_replicas(
    communicator: Communicator, parameters: Mapping[str, Tensor], state: Iterable[Tensor], step: int
) -> str | None:
    """Gives all ranks the parameters, and the `state` that goes with them, of most ranks, if some differ.

    Of two ranks those of rank 0. Returns what was done, None if nothing. Collective.
    """
    different, root = _different_from_most(communicator, parameters)
    if not different:
        return None
    broadcast_tensors(communicator, [*parameters.values(), *state], root)
    return (
        f"after step {step} the parameters of rank {different} differed from those of the other ranks: it has those of "
        f"rank {root} now; gradients were not combined alike, or memory was damaged: check those hosts"
    )


def _different_from_most(communicator: Communicator, parameters: Mapping[str, Tensor]) -> tuple[str, int]:
    """Ranks whose parameters are not those of most, with their hosts, empty if there are none; and one of most."""
    communicator.arrival(next(iter(parameters.values())).device).wait()  # what the hash reads
    hashes = communicator.all_gather_object(parameter_hash(parameters))
    most_common, _ = Counter(hashes).most_common(1)[0]  # of equally many, that of the lowest rank
    odd = [f"{rank} on {communicator.hosts[rank]}" for rank, each in enumerate(hashes) if each != most_common]
    return ", ".join(odd), hashes.index(most_common)
