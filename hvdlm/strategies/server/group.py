"""The ranks of a job of which some are parameter servers: who is what, and what they tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mailbox import Letter, Mailbox, open_mailbox
from hvdlm.config import Config
from hvdlm.errors import JobError


class Kind(IntEnum):
    """Of a letter; in brackets, the numbers in its header, then what it carries."""

    # From workers
    PUSH = 1  # (bucket, step): a server's part of the gradients of a bucket, as the codec encodes it
    APPLY = 2  # (step): what gradients are to be multiplied by, and the learning rate, float64
    SKIP = 3  # (step): the gradients of this step are of no use
    LOAD = 4  # (bucket, is_state): a server's part of parameters, or of the optimizer's state, float32
    PUBLISH = 5  # servers are to send parameters to all workers
    GIVE = 6  # (is_state): servers are to send parameters, or the optimizer's state, to the worker that asks
    END = 7  # (status): with which servers are to exit
    # From servers
    NORM = 8  # (is_stop_requested): the norm of what the server has of all gradients, float64
    WEIGHTS = 9  # (bucket): a server's part of parameters, as workers compute with them
    KEPT = 10  # (bucket, is_state): what LOAD would bring back


@dataclass(frozen=True)
class ServerGroup:
    """The first ranks of a job are workers, the last ones servers: so rank 0, which logs and writes checkpoints, is a
    worker, and workers have the numbers that they would have without servers.
    """

    mailbox: Mailbox  # of all ranks of the job
    workers: int
    servers: int
    node_count: int  # of the job

    @property
    def worker_ranks(self) -> Sequence[int]:
        return range(self.workers)

    @property
    def server_ranks(self) -> Sequence[int]:
        return range(self.workers, self.workers + self.servers)

    @property
    def own_server(self) -> int:
        """The number of the server that this rank is."""
        return self.mailbox.rank - self.workers

    @property
    def is_server(self) -> bool:
        return self.mailbox.rank >= self.workers

    def leave(self, status: int) -> None:
        """At the end of a worker; the first one tells servers with which status to exit."""
        if self.mailbox.rank == 0:
            self.mailbox.post(self.server_ranks, (Kind.END, status))
        self.mailbox.close()


def join_server_group(
    communicator: Communicator, config: Config, device: torch.device
) -> tuple[ServerGroup, Communicator]:
    """Divides the ranks of a job into workers and servers: returns who they are, and this rank's like. Collective.

    Raises JobError if no rank is left to train, the ranks cannot be divided, or they compute on GPUs.
    """
    if device.type != "cpu":
        raise JobError("parameter servers step on CPUs, and their workers train there: set train.device = 'cpu'")
    servers = config.server.ranks
    if servers >= communicator.size:
        ranks = f"{communicator.size} rank{'s' if communicator.size > 1 else ''}"
        raise JobError(f"server.ranks = {servers} of {ranks} leaves none to train: start more ranks, or fewer servers")
    if not communicator.supports("split"):
        raise JobError(f"engine {communicator.engine} cannot divide ranks into workers and servers: use engine mpi")
    workers = communicator.size - servers
    alike = communicator.split(int(communicator.rank >= workers), communicator.rank)
    alike.activity = communicator.activity  # which the job's watchdog looks at
    mailbox = open_mailbox(communicator, config.comm.timeout)
    return ServerGroup(mailbox, workers, servers, communicator.node_count), alike


class ServerLetters:
    """What servers send to a worker, in whatever order it comes."""

    def __init__(self, group: ServerGroup) -> None:
        self._group = group
        self._early: list[Letter] = []

    def tell(self, header: Sequence[int]) -> None:
        """Posts a letter without data to all servers."""
        self._group.mailbox.post(self._group.server_ranks, header)

    def expect(self, server: int, kind: Kind, number: int | None = None) -> Letter:
        """The next letter of a server that is of a kind, and whose first number is `number`."""
        source = self._group.server_ranks[server]

        def is_it(letter: Letter) -> bool:
            return letter.source == source and letter.kind == kind and number in (None, letter.header[1])

        for index, letter in enumerate(self._early):
            if is_it(letter):
                return self._early.pop(index)
        while True:
            letter = self._group.mailbox.receive(f"server {server}, rank {source}", [source])
            if is_it(letter):
                return letter
            self._early.append(letter)
