"""Two levels: sums within a node by the engine, whole and cheap; between nodes by a codec, one rank of each node."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.errors import HvdlmError


class Nodes:
    """The ranks of this node, of which the first speaks for all, and the first ranks of all nodes."""

    def __init__(self, communicator: Communicator) -> None:
        """Collective; raises HvdlmError where the engine cannot split the job."""
        if not communicator.supports("split"):
            raise HvdlmError(
                f"compression.by_node needs groups of ranks, which engine {communicator.engine} has not: "
                "set comm.engine to mpi or torch"
            )
        self._inside = communicator.split(communicator.node_rank, communicator.rank)
        self.speaks = self._inside.rank == 0
        self.between = communicator.split(int(not self.speaks), communicator.rank)

    def hand_to_speaker_(self, values: Tensor) -> None:
        """Replaces `values` by their sum over this node, on the rank that speaks for it, and by zeros on the others."""
        self._inside.all_reduce_(values)
        if not self.speaks:
            values.zero_()

    def reduce_(self, gradients: Tensor, reduce_between: Callable[[], None]) -> None:
        """Replaces `gradients` by their sum over all ranks; `reduce_between` does so over the first ranks of nodes."""
        self._inside.all_reduce_(gradients)
        if self.speaks:
            reduce_between()
        self._inside.broadcast_(gradients)
