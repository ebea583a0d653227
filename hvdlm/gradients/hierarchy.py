"""Hierarchical reduction: the engine sums within each node, and the local leaders of all nodes sum by a codec."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hvdlm.comm.communicator import Communicator


class Hierarchy:
    """The ranks of this node, of which the first is the local leader, and the local leaders of all nodes."""

    def __init__(self, communicator: Communicator) -> None:
        """Collective."""
        self._node = communicator.split(communicator.node_rank, communicator.rank)
        self.is_leader = self._node.rank == 0
        self.leaders = communicator.split(int(not self.is_leader), communicator.rank)

    def close(self) -> None:
        """Closes both groups. Collective."""
        self.leaders.close()
        self._node.close()

    def move_to_leader_(self, values: Tensor) -> None:
        """Replaces `values` by their sum over this node on its leader, and by zeros on the other ranks."""
        self._node.all_reduce_(values)
        if not self.is_leader:
            values.zero_()

    def reduce_(self, gradients: Tensor, reduce_over_leaders: Callable[[], None]) -> None:
        """Replaces `gradients` by their sum over all ranks; `reduce_over_leaders` sums those of the local leaders."""
        self._node.all_reduce_(gradients)
        if self.is_leader:
            reduce_over_leaders()
        self._node.broadcast_(gradients)
