"""Which ranks step together between two averages, and over which channels their groups average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.errors import JobError
from hvdlm.gradients.channel import Channel, open_channels


@dataclass(frozen=True)
class Groups:
    """Each rank is a group of its own, or the ranks of each node are one."""

    everyone: Communicator
    own: Communicator  # the ranks that step together with this one
    count: int
    index: int  # of this rank's group
    channels: list[Channel]  # among the first ranks of all groups; none on the others

    @property
    def is_leader(self) -> bool:
        """Whether this rank averages for its group."""
        return self.own.rank == 0

    def share_(self, average: Tensor) -> None:
        """Replaces `average` by that of the leader of this group. Collective over the group."""
        if self.own.size > 1:
            self.own.broadcast_(average)

    def move_to_leaders_(self, residual: Tensor) -> None:
        """Replaces a residual by its sum over those that send together, on the rank that sends, and by zeros on the
        others. Collective.
        """
        if self.own.size > 1:
            self.own.all_reduce_(residual)
            if not self.is_leader:
                residual.zero_()
        elif self.channels[0].hierarchy is not None:
            self.channels[0].hierarchy.move_to_leader_(residual)

    def close(self) -> None:
        """Collective."""
        for channel in self.channels:
            channel.close()


def make_groups(
    communicator: Communicator, channels: list[Channel], device: torch.device, config: Config, largest: int
) -> Groups:
    """The groups that `local_steps.hierarchical` asks for; `channels`: among all ranks. Collective.

    `largest`: elements of the largest bucket. Raises JobError on all ranks for masks among two groups.
    """
    is_each_alone = not config.local_steps.hierarchical or communicator.node_count == communicator.size
    count = communicator.size if is_each_alone else communicator.node_count
    if config.compression.codec == "masked" and count == 2:
        raise JobError(
            "compression.codec = 'masked' hides nothing where two average: each knows the other's differences by the "
            f"sum; start three or more {'ranks' if is_each_alone else 'nodes'}, or set it to another one"
        )
    if is_each_alone:
        return each_alone(communicator, channels)
    own = communicator.split(communicator.node_rank, communicator.rank)
    leaders = communicator.split(int(own.rank > 0), communicator.rank)
    among = open_channels(leaders, device, config.comm, config.compression, largest) if own.rank == 0 else []
    return Groups(communicator, own, communicator.node_count, communicator.node_rank, among)


def each_alone(communicator: Communicator, channels: list[Channel]) -> Groups:
    """Each rank as a group of its own; `channels`: among all."""
    return Groups(communicator, SoloCommunicator(), communicator.size, communicator.rank, channels)
