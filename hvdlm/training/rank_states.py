"""State that differs between ranks in a checkpoint: gathered to rank 0 and scattered again, one rank at a time.

Only rank 0 reads and writes files, since hosts need not share a file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.errors import HvdlmError
from hvdlm.strategies.strategy import RankState
from hvdlm.training.checkpoint import Checkpoint, save_failure


def gather_to_files(communicator: Communicator, own: Mapping[str, Tensor], parent: Path) -> Path | None:
    """Writes each rank's tensors to a file of its own in a new directory in `parent`, which rank 0 gets back.

    Names and shapes are equal on all ranks; None where there are none. Collective; raises JobError on every rank if
    rank 0 cannot write.
    """
    if not own:
        return None
    directory = parent / "ranks.partial"

    def begin() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    _on_rank_0(communicator, directory, begin)
    for rank in range(communicator.size):
        tensors = {name: _move(communicator, tensor, rank, 0) for name, tensor in own.items()}
        communicator.arrival(next(iter(own.values())).device).wait()  # for a rank that has died, with a deadline
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        write = partial(safetensors.torch.save_file, plain, directory / f"rank_{rank:05d}.safetensors")
        _on_rank_0(communicator, directory, write)
    return directory


def read_equal_state(source: Checkpoint | None, tensors: Mapping[str, Tensor], old_size: int) -> None:
    """Fills tensors that are equal on all ranks, parameters and optimizer state, from a checkpoint. For rank 0.

    What each rank had of its own then becomes the mean. Tensors that the checkpoint does not hold stay as they are.
    """
    assert source is not None
    saved = {**source.model(), **source.optimizer()}
    missing = tensors.keys() - saved.keys()
    states = (source.rank_state(rank) for rank in range(old_size)) if missing else iter(())
    means: dict[str, Tensor] = {}
    for state in states:
        for name in missing & state.keys():
            means[name] = means.get(name, 0) + state[name] / old_size
    with torch.no_grad():
        for name, tensor in tensors.items():
            found = saved.get(name, means.get(name))
            if found is not None:
                tensor.copy_(found)


def scatter_from_checkpoint(
    communicator: Communicator, source: Checkpoint | None, own: RankState, old_size: int
) -> None:
    """Fills `own` on every rank from the checkpoint that rank 0 has open.

    On as many ranks as before, each gets its own tensors; on another number, what `RankState` says. What was equal on
    all ranks then becomes each rank's own. Tensors that the checkpoint does not hold stay as they are. Collective.
    """
    read_equal = cache(lambda: source.optimizer() if source is not None else {})  # only if a rank's file lacks a name
    if old_size == communicator.size:
        for rank in range(communicator.size):
            saved = _read(communicator, source, rank)
            for name, tensor in own.tensors().items():
                found = saved[name] if name in saved else read_equal().get(name, tensor)
                moved = _move(communicator, found.to(tensor.device), 0, rank)
                if communicator.rank == rank:
                    tensor.copy_(moved)
        return
    shared = {**own.summed, **own.averaged}
    sums: dict[str, Tensor] = {}
    for rank in range(old_size):
        saved = _read(communicator, source, rank)
        for name in shared.keys() & saved.keys():
            sums[name] = sums[name] + saved[name] if name in sums else saved[name]
    for name, tensor in shared.items():
        if name in sums:
            tensor.copy_(sums[name] / (communicator.size if name in own.summed else old_size))
        elif name in own.averaged:
            tensor.copy_(read_equal().get(name, tensor))
        communicator.broadcast_(tensor)


def _read(communicator: Communicator, source: Checkpoint | None, rank: int) -> dict[str, Tensor]:
    """What a checkpoint holds of a rank; on rank 0, and nothing on the others. Collective."""
    saved: dict[str, Tensor] = {}
    on_rank_0(communicator, lambda: saved.update(source.rank_state(rank) if source else {}))
    return saved


def _on_rank_0(communicator: Communicator, directory: Path, write: Callable[[], None]) -> None:
    """Writes on rank 0, for which the others wait however slow its disk is. Collective."""

    def try_to_write() -> None:
        try:
            write()
        except (OSError, safetensors.SafetensorError) as error:
            raise HvdlmError(
                f"cannot write {directory}: {save_failure(error)}, then go on with --resume latest"
            ) from error

    on_rank_0(communicator, try_to_write)


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
