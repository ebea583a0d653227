"""What differs from rank to rank in a checkpoint: gathered to rank 0 and handed out again, one rank's at a time.

Rank 0 alone reads and writes, since a cluster need not share a file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.errors import HvdlmError
from hvdlm.training.agreement import together
from hvdlm.training.checkpoint import Checkpoint


def gather_to_files(communicator: Communicator, own: Mapping[str, Tensor], parent: Path) -> Path | None:
    """Writes each rank's tensors to a file of its own in a new directory in `parent`, which rank 0 gets back.

    Names and shapes are equal on all ranks; None where there are none. Collective; raises JobError on every rank if
    rank 0 cannot write.
    """
    if not own:
        return None
    directory = parent / "ranks.partial"
    failure: HvdlmError | None = None
    for rank in range(communicator.size):
        tensors = {name: _moved(communicator, tensor, rank, 0) for name, tensor in own.items()}
        if communicator.rank == 0 and failure is None:
            try:
                if rank == 0:
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir(parents=True)
                plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
                safetensors.torch.save_file(plain, directory / f"rank_{rank:05d}.safetensors")
            except (OSError, safetensors.SafetensorError) as error:
                # the others go on sending: they are told when all have
                failure = HvdlmError(f"cannot write {directory}: {error}; make room, then go on with --resume latest")

    def complain() -> None:
        if failure is not None:
            raise failure

    together(communicator, complain)
    return directory


def hand_out(communicator: Communicator, source: Checkpoint | None, own: Mapping[str, Tensor], old_size: int) -> None:
    """Fills `own` on every rank from the checkpoint that rank 0 has open.

    On as many ranks as there were, each gets its own again. On another number, each gets an equal part of the sum
    over the old ones: what they owed together is owed still. What the checkpoint does not hold stays as it is.
    Collective.
    """
    if old_size == communicator.size:
        for rank in range(communicator.size):
            saved = source.rank_state(rank) if source is not None else {}
            for name, tensor in own.items():
                moved = _moved(communicator, saved.get(name, tensor).to(tensor.device), 0, rank)
                if communicator.rank == rank:
                    tensor.copy_(moved)
        return
    if source is not None:
        sums: dict[str, Tensor] = {}
        for rank in range(old_size):
            saved = source.rank_state(rank)
            for name in own.keys() & saved.keys():
                sums[name] = sums[name] + saved[name] if name in sums else saved[name]
        for name, total in sums.items():
            own[name].copy_(total / communicator.size)
    for tensor in own.values():
        communicator.broadcast_(tensor)


def _moved(communicator: Communicator, tensor: Tensor, source: int, destination: int) -> Tensor:
    """`tensor` of rank `source`, on rank `destination`; elsewhere something of its shape. All ranks call it."""
    if source == destination:
        return tensor
    if not communicator.supports("send"):
        return communicator.broadcast_(tensor.clone(), source)
    if communicator.rank == source:
        communicator.send(tensor, destination)
    if communicator.rank == destination:
        return communicator.receive_(torch.empty_like(tensor), source)
    return tensor
