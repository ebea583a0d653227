"""State that differs between ranks in a checkpoint: gathered to rank 0 and scattered again, one rank at a time.

Only rank 0 reads and writes files, since hosts need not share a file system.
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
from hvdlm.training.checkpoint import Checkpoint
from hvdlm.training.rank_errors import on_all_ranks


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
        tensors = {name: _move(communicator, tensor, rank, 0) for name, tensor in own.items()}
        communicator.arrival(next(iter(own.values())).device).wait()  # for a rank that has died, with a deadline
        if communicator.rank == 0 and failure is None:
            try:
                if rank == 0:
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir(parents=True)
                plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
                safetensors.torch.save_file(plain, directory / f"rank_{rank:05d}.safetensors")
            except (OSError, safetensors.SafetensorError) as error:
                # the others continue to send; they learn of the error when all have sent
                failure = HvdlmError(f"cannot write {directory}: {error}; make room, then go on with --resume latest")

    def raise_failure() -> None:
        if failure is not None:
            raise failure

    on_all_ranks(communicator, raise_failure)
    return directory


def scatter_from_checkpoint(
    communicator: Communicator, source: Checkpoint | None, own: Mapping[str, Tensor], old_size: int
) -> None:
    """Fills `own` on every rank from the checkpoint that rank 0 has open.

    On as many ranks as before, each gets its own tensors. On another number, each gets an equal part of the sum over
    the old ranks, so that the sum of residuals is preserved. Tensors that the checkpoint does not hold stay as they
    are. Collective.
    """
    if old_size == communicator.size:
        for rank in range(communicator.size):
            saved = source.rank_state(rank) if source is not None else {}
            for name, tensor in own.items():
                moved = _move(communicator, saved.get(name, tensor).to(tensor.device), 0, rank)
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


def _move(communicator: Communicator, tensor: Tensor, source: int, destination: int) -> Tensor:
    """`tensor` of rank `source`, on rank `destination`; on other ranks any tensor of its shape. Collective."""
    if source == destination:
        return tensor
    if not communicator.supports("send"):
        return communicator.broadcast_(tensor.clone(), source)
    if communicator.rank == source:
        communicator.send(tensor, destination)
    if communicator.rank == destination:
        return communicator.receive_(torch.empty_like(tensor), source)
    return tensor
