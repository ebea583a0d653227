"""State that differs between ranks, from a checkpoint that rank 0 reads, since hosts need not share a file system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.strategies.held_parts import HeldParts
from hvdlm.strategies.strategy import RankState
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.parts_file import take


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


def read_parts(
    communicator: Communicator, source: Checkpoint | None, own: Mapping[str, Tensor], held: HeldParts, old_size: int
) -> None:
    """The same where each rank has a part, by `held`, in `own`: rank 0 sends one whole tensor after the other, which no
    rank keeps. Collective.
    """
    shapes = {**held.shapes, **held.state_shapes()}

    def names_and_own() -> tuple[set[str], set[str]]:
        assert source is not None
        return source.names(), {name for rank in range(min(old_size, 1)) for name in source.rank_state(rank)}

    equal, differed = on_rank_0(communicator, names_and_own)
    for name, shape in shapes.items():
        if name not in equal | differed:
            continue

        whole = torch.empty(shape)
        on_rank_0(communicator, partial(_read_whole, source, name, name in equal, old_size, whole))
        broadcast_tensors(communicator, [whole])
        if name in own:
            take(whole, held.runs_of(name), own[name])


def _read_whole(source: Checkpoint | None, name: str, is_equal: bool, old_size: int, whole: Tensor) -> None:
    """Fills `whole` with a tensor of a checkpoint; if ranks had one each, with their mean. Raises HvdlmError if it is a
    parameter that is not finite.
    """
    assert source is not None
    if is_equal:
        whole.copy_(source.tensor(name))
        return
    whole.zero_()
    for rank in range(old_size):
        whole.add_(source.rank_state(rank)[name] / old_size)


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
            _give(communicator, _read(communicator, source, rank), read_equal, own.tensors(), rank)
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


def _give(
    communicator: Communicator,
    saved: Mapping[str, Tensor],
    read_equal: Callable[[], Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
    rank: int,
) -> None:
    """Fills what rank `rank` has as its `own` from what rank 0 has of it in `saved`, or else in common. Ranks that hold
    different parts of a model have different names. Collective.
    """
    wanted = communicator.broadcast_object(list(own), rank)
    found: dict[str, Tensor] = {}
    if communicator.rank == 0:
        for name in wanted:
            if name in saved or name in read_equal():
                found[name] = saved[name] if name in saved else read_equal()[name]
    device = next(iter(own.values())).device if own else torch.device("cpu")
    told = [(name, tensor.shape, tensor.dtype) for name, tensor in found.items()]
    for name, shape, dtype in communicator.broadcast_object(told):
        tensor = found[name] if communicator.rank == 0 else torch.empty(shape, dtype=dtype)
        moved = move(communicator, tensor.to(device), 0, rank)
        if communicator.rank == rank:
            own[name].copy_(moved)


def _read(communicator: Communicator, source: Checkpoint | None, rank: int) -> dict[str, Tensor]:
    """What a checkpoint holds of a rank; on rank 0, and nothing on the others. Collective."""
    saved: dict[str, Tensor] = {}
    on_rank_0(communicator, lambda: saved.update(source.rank_state(rank) if source else {}))
    return saved


def move(communicator: Communicator, tensor: Tensor, source: int, destination: int) -> Tensor:
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
