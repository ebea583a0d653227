"""Reports which ranks are missing when a wait has timed out, by TCP connections beside the engine's.

Each rank answers liveness probes from a thread, whatever else it does. A rank that is suspended, or whose host is down,
does not answer; one that has died refuses the connection.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.interfaces import own_interfaces
from hvdlm.comm.liveness import LivenessServer, is_alive

# Seconds for one address to answer; TCP sends a lost packet again after one second.
_PROBE_TIMEOUT = 1.5

_MAX_CONCURRENT_PROBES = 64
_MAX_NAMED_RANKS = 4


class MissingRankReporter:
    """Answers the probes of other ranks, and probes them when asked for a report."""

    def __init__(self, communicator: Communicator) -> None:
        """Collective."""
        self._rank, self._hosts = communicator.rank, communicator.hosts
        job = str(communicator.broadcast_object(uuid.uuid4().hex))
        self._tokens = [f"{job} {rank}\n" for rank in range(communicator.size)]
        self._server = LivenessServer(self._tokens[self._rank])
        addresses = [str(interface.address.ip) for interface in own_interfaces()]
        self._endpoints: list[tuple[list[str], int]] = communicator.all_gather_object((addresses, self._server.port))

    def report(self) -> str:
        """Which ranks do not answer, and what to look for, as a phrase that ends a sentence."""
        others = [rank for rank in range(len(self._tokens)) if rank != self._rank]
        with ThreadPoolExecutor(_MAX_CONCURRENT_PROBES) as pool:
            silent = [rank for rank, alive in zip(others, pool.map(self._is_alive, others), strict=True) if not alive]
        if not silent:
            return "all ranks answer: look for one that has fallen behind, or for a network that loses messages"
        if len(silent) == len(others) > 1:
            return f"none of the other ranks answers: look at the network of {self._hosts[self._rank]}"
        named = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in silent[:_MAX_NAMED_RANKS])
        more = f" and {len(silent) - _MAX_NAMED_RANKS} more" if len(silent) > _MAX_NAMED_RANKS else ""
        return f"{named}{more} {'does' if len(silent) == 1 else 'do'} not answer: stopped, dead, or out of reach"

    def close(self) -> None:
        """Stops answering."""
        self._server.close()

    def _is_alive(self, rank: int) -> bool:
        addresses, port = self._endpoints[rank]
        if self._hosts[rank] == self._hosts[self._rank]:
            addresses = ["127.0.0.1"]
        return any(is_alive(address, port, self._tokens[rank], _PROBE_TIMEOUT) for address in addresses)
