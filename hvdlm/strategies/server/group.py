"""The ranks of a job of which some are parameter servers: who is what, and what they tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError, LostRankError
from hvdlm.comm.mailbox import Letter, Mailbox, open_mailbox
from hvdlm.config import Config
from hvdlm.config.server import no_workers
from hvdlm.errors import JobError


class Kind(IntEnum):
    """Of a letter; in brackets, the numbers in its header, then what it carries."""

    # From workers
    # (bucket, step or task, step of the codec): a server's part of the gradients of a bucket, as the codec encodes it
    PUSH = 1
    APPLY = 2  # (step): what gradients are to be multiplied by, and the learning rate, float64
    SKIP = 3  # (step): the gradients of this step are of no use
    LOAD = 4  # (bucket, is_state): a server's part of parameters, or of the optimizer's state, float32
    PUBLISH = 5  # (step): servers are to send parameters to all workers, who go on after this step
    GIVE = 6  # (is_state): servers are to send parameters, or the optimizer's state, to the worker that asks
    # (status, have_died): with which servers are to exit, and whether some workers have died; from a server that is a
    # process of its own: (status), with which workers are to exit
    END = 7
    # From servers
    NORM = 8  # (is_stop_requested): the norm of what the server has of all gradients, float64
    WEIGHTS = 9  # (bucket): a server's part of parameters, as workers compute with them
    KEPT = 10  # (bucket, is_state): what LOAD would bring back
    # Of asynchronous training: from workers to the first server
    # (task or NONE, version, is_stop_requested): it is pushed, and another wanted; a process of its own that is to stop
    # leaves, or if it is a server asks for all to stop; loss and tokens, float64
    DONE = 11
    # From other servers to the first
    HAVE = 19  # (task, worker): all that was pushed
    # From the first server to workers
    # (task, version, its first batch): to be trained on, with the parameters that servers are about to send; lines of
    # the log. To other servers that are processes of their own, where no worker is left: each is to train on it
    TASK = 12
    # (step, is_end, workers): all have done all tasks of the steps before; lines of the log. Also to other servers
    # that are processes of their own
    BOUNDARY = 13
    # From the first server to the others, which act in this order
    ADD = 14  # (task, worker, version): what was pushed counts, and was computed with that version of parameters
    DROP = 15  # (task, worker): it does not
    SUM = 16  # (): they are to say the NORM of the sums
    STEP = 17  # (version): as APPLY, from this version to the next; a factor of 0 leaves the step out
    SERVE = 18  # (worker, ahead): it is to get parameters, as predicted for so many thousandths of a step from now
    LEFT = 20  # (worker): nothing that it has sent, or will send, is of use


NONE = -1  # no task


@dataclass(frozen=True)
class ServerGroup:
    """The first ranks of a job are workers, the last ones servers: so rank 0, which logs and writes checkpoints, is a
    worker, and workers have the numbers that they would have without servers.

    Servers that are processes of their own have numbers above those of all workers that may come.
    """

    mailbox: Mailbox  # of all ranks of the job
    workers: int  # the most that may come, where they do at any time
    servers: int
    everyone: Communicator  # all of them; of processes of their own, each alone

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

    def end(self, status: int, workers: Communicator) -> None:
        """At the end of each of the `workers` that live; the first one tells servers with which status to exit."""
        have_died = workers.size < self.workers
        if workers.rank == 0:
            self.mailbox.post(self.server_ranks, (Kind.END, status, int(have_died)))
        self.leave(have_died)

    def leave(self, have_died: bool) -> None:
        """At the end of each rank. If some have died, the others leave them out, to end together."""
        self.mailbox.close()
        if have_died:  # another worker may be about to return from the last barrier
            self.everyone.regroup_(revokes=False)


def join_server_group(
    communicator: Communicator, config: Config, device: torch.device
) -> tuple[ServerGroup, Communicator]:
    """Divides the ranks of a job into workers and servers: returns who they are, and this rank's like. Collective.

    Raises JobError if no rank is left to train, the ranks cannot be divided, or they compute on GPUs.
    """
    check_on_cpu(device)
    servers = config.server.ranks
    if servers >= communicator.size:
        raise JobError(no_workers(servers, communicator.size))
    if not communicator.supports("split"):
        raise JobError(f"engine {communicator.engine} cannot divide ranks into workers and servers: use engine mpi")
    workers = communicator.size - servers
    alike = communicator.split(int(communicator.rank >= workers), communicator.rank)
    alike.activity = communicator.activity  # which the job's watchdog looks at
    mailbox = open_mailbox(communicator, config.comm.timeout)
    return ServerGroup(mailbox, workers, servers, communicator), alike


def check_on_cpu(device: torch.device) -> None:
    """Raises JobError for another device."""
    if device.type != "cpu":
        raise JobError("parameter servers step on CPUs, and their workers train there: set train.device = 'cpu'")


class ServerLetters:
    """What servers send to a worker, in whatever order it comes."""

    def __init__(self, group: ServerGroup) -> None:
        self._group = group
        self._early: list[Letter] = []
        self.is_patient = False  # whether one may take any time

    def tell(self, header: Sequence[int]) -> None:
        """Posts a letter without data to all servers."""
        self._group.mailbox.post(self._group.server_ranks, header)

    def expect(self, server: int, *kinds: Kind, number: int | None = None) -> Letter:
        """The next letter of a server that is of one of these kinds, and whose first number is `number`."""
        source = self._group.server_ranks[server]

        def is_it(letter: Letter) -> bool:
            return letter.source == source and letter.kind in kinds and number in (None, letter.header[1])

        for index, letter in enumerate(self._early):
            if is_it(letter):
                return self._early.pop(index)
        while True:
            try:
                letter = self._group.mailbox.receive(f"server {server}, rank {source}", [source], self.is_patient)
            except DeadRankError as error:  # without it no worker can go on
                raise LostRankError(f"{error}: go on with --resume latest") from error
            if is_it(letter):
                return letter
            self._early.append(letter)
