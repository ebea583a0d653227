"""Who is missing? What a rank asks that has waited in vain, on a way of its own beside the engine's.

Each rank answers from a thread, whatever else it is doing: one that has been stopped, or whose host is down, does not
answer, and one that has died refuses.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.doorbell import Doorbell, answers
from hvdlm.comm.interfaces import own_interfaces

# Seconds for one address to answer; a lost packet is sent again after one.
_PATIENCE = 1.5

# Ranks asked at once, and ranks named in a sentence.
_AT_ONCE = 64
_NAMED = 4


class RollCall:
    """This rank's answer, and where to ask the others."""

    def __init__(self, communicator: Communicator) -> None:
        """Collective."""
        self._rank, self._hosts = communicator.rank, communicator.hosts
        job = str(communicator.broadcast_object(uuid.uuid4().hex))
        self._words = [f"{job} {rank}\n" for rank in range(communicator.size)]
        self._bell = Doorbell(self._words[self._rank])
        addresses = [str(interface.address.ip) for interface in own_interfaces()]
        self._places: list[tuple[list[str], int]] = communicator.all_gather_object((addresses, self._bell.port))

    def missing(self) -> str:
        """What is wrong, as far as the other ranks' answers tell."""
        others = [rank for rank in range(len(self._words)) if rank != self._rank]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            silent = [rank for rank, heard in zip(others, pool.map(self._answers, others), strict=True) if not heard]
        if not silent:
            return "all ranks answer: look for one that has fallen behind, or for a network that loses messages"
        if len(silent) == len(others) > 1:
            return f"none of the other ranks answers: look at the network of {self._hosts[self._rank]}"
        named = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in silent[:_NAMED])
        more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
        return f"{named}{more} {'does' if len(silent) == 1 else 'do'} not answer: stopped, dead, or out of reach"

    def close(self) -> None:
        """Answers no more."""
        self._bell.close()

    def _answers(self, rank: int) -> bool:
        addresses, port = self._places[rank]
        if self._hosts[rank] == self._hosts[self._rank]:
            addresses = ["127.0.0.1"]
        return any(answers(address, port, self._words[rank], _PATIENCE) for address in addresses)
