"""What ranks know of each other by TCP connections beside the engine's: who is missing, who has failed.

Each rank answers liveness probes from a thread, whatever else it does. A rank that is suspended, or whose host is down,
does not answer; one that has died refuses the connection. So a rank can tell the others that it has failed while they
wait for it in a collective operation, and can end them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hvdlm.comm.activity import is_waiting
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import RunningTime
from hvdlm.comm.interfaces import own_interfaces
from hvdlm.comm.liveness import LivenessServer, ask

# Seconds for one address to answer; TCP sends a lost packet again after one second.
_PROBE_TIMEOUT = 1.5

_MAX_CONCURRENT_PROBES = 64
_MAX_NAMED_RANKS = 4

# Seconds between two questions to the same ranks.
_ASK_EVERY = 0.05

# States of a rank. Failed: it has raised an error that all ranks raise. Closing: it knows that all of them have.
_FAILED, _CLOSING = "failed", "closing"


class MissingRankReporter:
    """Answers the probes of other ranks, and probes them when asked for a report."""

    def __init__(self, communicator: Communicator, doing: Callable[[], str] = lambda: "") -> None:
        """`doing`: what this rank is doing, for others that ask. Collective."""
        self._rank, self._hosts = communicator.rank, communicator.hosts
        # Whoever connects is told the name of the job; who may end it knows the other word too
        job, self._password = communicator.broadcast_object((uuid.uuid4().hex, uuid.uuid4().hex))
        self._tokens = [f"{job} {rank} " for rank in range(communicator.size)]
        self._others = [rank for rank in range(communicator.size) if rank != self._rank]
        token, end = self._tokens[self._rank], lambda: os._exit(1)
        self._server = LivenessServer(token, password=self._password, on_end=end)
        self._server.doing = doing
        addresses = [str(interface.address.ip) for interface in own_interfaces()]
        self._endpoints: list[tuple[list[str], int]] = communicator.all_gather_object((addresses, self._server.port))

    def report(self) -> str:
        """Which ranks do not answer, and what to look for, as a phrase that ends a sentence."""
        answers = self._ask_all(self._others)
        silent = [rank for rank, answer in zip(self._others, answers, strict=True) if answer is None]
        if not silent:
            doing = {rank: answer[1] for rank, answer in zip(self._others, answers, strict=True) if answer is not None}
            behind = [rank for rank, what in doing.items() if what and not is_waiting(what)][:_MAX_NAMED_RANKS]
            if behind:
                said = (f"rank {rank} on {self._hosts[rank]} is behind: it {doing[rank]}" for rank in behind)
                return "; ".join(said)
            return "all ranks answer: look for one that has fallen behind, or for a network that loses messages"
        if len(silent) == len(self._others) > 1:
            return f"none of the other ranks answers: look at the network of {self._hosts[self._rank]}"
        named = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in silent[:_MAX_NAMED_RANKS])
        more = f" and {len(silent) - _MAX_NAMED_RANKS} more" if len(silent) > _MAX_NAMED_RANKS else ""
        return f"{named}{more} {'does' if len(silent) == 1 else 'do'} not answer: stopped, dead, or out of reach"

    def have_all_failed(self, seconds: float) -> bool:
        """Tells the others that this rank has failed, and returns whether all of them say the same within `seconds`.

        For rank 0; the others call `has_rank_0_seen_all_fail`.
        """
        self._server.state = _FAILED
        clock, running = RunningTime(), self._others
        while running and clock.seconds() < seconds:
            states = self._ask(running)
            running = [rank for rank, state in zip(running, states, strict=True) if state != _FAILED]
            if running:
                time.sleep(_ASK_EVERY)
        if not running:
            self._server.state = _CLOSING
        return not running

    def has_rank_0_seen_all_fail(self, seconds: float) -> bool | None:
        """Tells the others that this rank has failed; whether rank 0 knows within `seconds` that all have.

        None if a lower rank has failed, but not all: it says so, and ends this one.
        """
        self._server.state = _FAILED
        clock, state = RunningTime(), None
        while clock.seconds() < (2 * seconds if state == _FAILED else seconds):
            (state,) = self._ask([0])
            if state == _CLOSING:
                return True
            time.sleep(_ASK_EVERY)
        return None if _FAILED in self._ask(range(self._rank)) else False

    def end_others(self) -> None:
        """Asks all other ranks to end, with status 1: not every launcher ends them when this one does."""
        self._ask(self._others, self._password)

    def close(self) -> None:
        """Stops answering."""
        self._server.close()

    def _ask(self, ranks: Sequence[int], password: str = "") -> list[str | None]:
        """The state of each of `ranks`; None of one that does not answer. With the password they are asked to end."""
        return [None if answer is None else answer[0] for answer in self._ask_all(ranks, password)]

    def _ask_all(self, ranks: Sequence[int], password: str = "") -> list[tuple[str, str] | None]:
        """The state of each of `ranks` and what it is doing."""
        if len(ranks) == 1:
            return [self._ask_one(ranks[0], password)]
        with ThreadPoolExecutor(_MAX_CONCURRENT_PROBES) as pool:
            return list(pool.map(lambda rank: self._ask_one(rank, password), ranks))

    def _ask_one(self, rank: int, password: str) -> tuple[str, str] | None:
        addresses, port = self._endpoints[rank]
        if self._hosts[rank] == self._hosts[self._rank]:
            addresses = ["127.0.0.1"]
        answers = (ask(each, port, self._tokens[rank], _PROBE_TIMEOUT, password) for each in addresses)
        return next((answer for answer in answers if answer is not None), None)
