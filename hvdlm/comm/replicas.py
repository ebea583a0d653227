"""Gives all ranks the same parameters, and checks that they still have them."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.work import Work
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


def check_replicas(
    communicator: Communicator, parameters: Mapping[str, Tensor], step: int, part: int | None = None
) -> None:
    """Raises JobError on every rank, naming those that differ from most, unless all hold equal parameters.

    `part`: where ranks divide a model, a number of what this rank holds; it is compared with ranks that hold the same.
    """
    hashes, parts = _hashes(communicator, parameters), communicator.all_gather_object(part)
    odd = []
    for each in set(parts):
        ranks = [rank for rank, held in enumerate(parts) if held == each]
        odd += [ranks[index] for index in _different_from_most([hashes[rank] for rank in ranks])[0]]
    if odd:
        healing = ", or set train.heal_replicas" if part is None else ""
        raise JobError(
            f"after step {step} the parameters of {_names(sorted(odd), communicator)} differ from those of the other "
            "ranks: gradients were not combined alike, or memory was damaged; check those hosts and resume from a "
            f"checkpoint{healing}"
        )


class ReplicaHealer:
    """Gives ranks whose parameters differ those of most ranks."""

    def __init__(self) -> None:
        self._is_half_healed = False  # a rank has died meanwhile: what this one holds is neither old nor new

    def heal(
        self, communicator: Communicator, parameters: Mapping[str, Tensor], state: Iterable[Tensor], step: int
    ) -> str | None:
        """Gives all ranks the parameters, and the `state` that goes with them, of most ranks, if some differ.

        Of two ranks those of rank 0. Returns what was done, None if nothing. Collective.

        Raises JobError on all ranks if none that is whole is left.
        """
        hashes = _hashes(communicator, None if self._is_half_healed else parameters)
        odd, root = _different_from_most(hashes)
        if hashes[root] is None:
            raise JobError(f"after step {step} no rank with whole parameters is left: resume from the last checkpoint")
        if not odd:
            return None
        self._is_half_healed |= communicator.rank in odd
        broadcast_tensors(communicator, [*parameters.values(), *state], root)
        self._is_half_healed = False
        return (
            f"after step {step} the parameters of {_names(odd, communicator)} differed from those of the other ranks: "
            f"it has those of rank {root} now; gradients were not combined alike, or memory was damaged: check those "
            "hosts"
        )


def _hashes(communicator: Communicator, parameters: Mapping[str, Tensor] | None) -> list[str | None]:
    """Of all ranks; None of one that passes no parameters. Collective."""
    if parameters is None:
        return communicator.all_gather_object(None)
    for device in {each.device for each in parameters.values()}:
        communicator.arrival(device).wait()  # of what the hash reads
    return communicator.all_gather_object(parameter_hash(parameters))


def _different_from_most(hashes: Sequence[str | None]) -> tuple[list[int], int]:
    """Ranks that do not have the hash of most, and the first one that has; of equally many, that of the lowest rank."""
    counts = Counter(each for each in hashes if each is not None)
    most_common = counts.most_common(1)[0][0] if counts else None
    return [rank for rank, each in enumerate(hashes) if each != most_common], hashes.index(most_common)


def _names(ranks: Sequence[int], communicator: Communicator) -> str:
    return "rank " + ", ".join(f"{rank} on {communicator.hosts[rank]}" for rank in ranks)
