"""The ranks of a job in a mesh of named axes.

Ranks that differ in one axis only are a group with a communicator of its own, `mesh["tensor"]`. Of two neighbouring
ranks, which mostly share a host, the innermost axis differs first: tensor, which sends most and most often, then shard,
then data, then pipeline, which sends least (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM", SC 2021, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import ParallelSection
from hvdlm.errors import HvdlmError

AXES = ("pipeline", "data", "shard", "tensor")  # from the one whose index changes last to that whose changes first


def mesh_shape(parallel: ParallelSection, ranks: int) -> dict[str, int]:
    """How many ranks each axis of a job of `ranks` ranks has.

    Raises HvdlmError, with the next number of ranks that would do, if they cannot be arranged so.
    """
    fixed = parallel.tensor * parallel.pipeline
    groups = parallel.data or (1 if parallel.shard else max(1, ranks // fixed))
    shard = max(1, ranks // (fixed * groups)) if parallel.shard else 1
    if fixed * groups * shard != ranks:
        step = fixed * (parallel.data or 1)
        counts = [parallel.data * fixed] if parallel.data and not parallel.shard else []
        counts = counts or sorted({max(step, ranks // step * step), -(-ranks // step) * step})
        product = " x ".join(
            f"parallel.{name} = {value}"
            for name, value in (("pipeline", parallel.pipeline), ("data", parallel.data), ("tensor", parallel.tensor))
            if value > 1
        )
        raise HvdlmError(
            f"{ranks} ranks cannot be arranged by {product}: start {' or '.join(map(str, counts))} ranks, or change "
            "[parallel]"
        )
    return {"pipeline": parallel.pipeline, "data": groups, "shard": shard, "tensor": parallel.tensor}


class Mesh:
    """The ranks of a communicator, by axis."""

    def __init__(self, communicator: Communicator, shape: Mapping[str, int]) -> None:
        """`shape`: from `mesh_shape`."""
        self.everyone = communicator
        self.shape = {axis: shape[axis] for axis in AXES}
        if math.prod(self.shape.values()) != communicator.size:
            raise ValueError(f"a mesh of {self.shape} for {communicator.size} ranks")
        self.coordinates = coordinates(self.shape, communicator.rank)
        self._groups: dict[tuple[str, ...], Communicator] = {}

    def __getitem__(self, axis: str) -> Communicator:
        """The ranks that differ from this one in `axis` alone, in its order. Collective at its first use."""
        return self.group(axis)

    def group(self, *axes: str) -> Communicator:
        """The ranks that differ from this one in these axes alone, in the order of their ranks in the job.

        All ranks of the job are `everyone`, but as the axis `tensor`: computation waits for each of its many messages,
        so it is inline and has a communicator that no other message uses. Collective at its first use. Raises
        HvdlmError if the engine cannot split.
        """
        wanted = tuple(axis for axis in AXES if axis in axes and self.shape[axis] > 1)
        if set(axes) - set(AXES):
            raise ValueError(f"{axes} are not all axes of a mesh")
        if wanted not in self._groups:
            self._groups[wanted] = self._split(wanted)
        return self._groups[wanted]

    def is_first(self, *axes: str) -> bool:
        """Whether this rank is the first one along each of these axes."""
        return not any(self.coordinates[axis] for axis in axes)

    def place(self, *along: str) -> int:
        """A number that ranks have in common which differ along these axes alone, and no others have."""
        number = 0
        for axis in AXES:
            if axis not in along:
                number = number * self.shape[axis] + self.coordinates[axis]
        return number

    def _split(self, axes: Sequence[str]) -> Communicator:
        if not axes:
            return SoloCommunicator()
        is_tensor = axes == ("tensor",)
        if math.prod(self.shape[axis] for axis in axes) == self.everyone.size and not is_tensor:
            return self.everyone
        if not self.everyone.supports("split"):
            raise HvdlmError(
                f"engine {self.everyone.engine} cannot split ranks into groups, which [parallel] needs here: set "
                "comm.engine = 'mpi' or 'torch'"
            )
        group = self.everyone.split(self.place(*axes), self.everyone.rank)
        group.is_inline = is_tensor
        return group


def coordinates(shape: Mapping[str, int], rank: int) -> dict[str, int]:
    """The index of a rank of the job in each axis of a mesh."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, shape[axis])
    return {axis: found[axis] for axis in AXES}
