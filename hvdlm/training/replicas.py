"""Gives all ranks the same parameters, and checks that they still have them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.errors import JobError


@torch.no_grad()
def broadcast_tensors(communicator: Communicator, tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by rank 0's. Collective."""
    for work in [communicator.broadcast_async_(tensor, root=0) for tensor in tensors]:
        work.wait()


def parameter_hash(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names and bytes of the parameters."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_replicas(communicator: Communicator, parameters: Mapping[str, Tensor], step: int) -> None:
    """Raises JobError on every rank, naming those that differ from most, unless all hold equal parameters."""
    hashes = communicator.all_gather_object(parameter_hash(parameters))
    most_common, count = Counter(hashes).most_common(1)[0]
    if count == communicator.size:
        return
    different = ", ".join(f"{r} on {communicator.hosts[r]}" for r, each in enumerate(hashes) if each != most_common)
    raise JobError(
        f"after step {step} the parameters of rank {different} differ from those of the other ranks: gradients were "
        "not combined alike, or memory was damaged; check those hosts and resume from a checkpoint"
    )
