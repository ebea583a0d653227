"""A turn: some steps of one contestant while all others stand still, and what was measured meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.contestant import Contestant
from hvdlm.training.replicas import parameter_hash


@dataclass(frozen=True)
class Request:
    """What the race asks of every rank of a job. A path asks rank 0 to leave the parameters there afterwards."""

    contestant: str
    steps: int
    parameters: Path | None = None


@dataclass(frozen=True)
class Turn:
    """A turn as one rank saw it, or of all ranks together: means over its steps."""

    step_seconds: float
    waited_seconds: float | None  # for gradients, after the backward pass; None: the contestant does not tell
    wire_bytes: float | None  # sent by a rank, as the contestant tells
    interface_bytes: float | None  # sent by a rank, as the kernel counts; None: no interface to count at


def take_turn(contestant: Contestant, steps: int, interface: str | None) -> Turn:
    """Runs one step that is not counted, then `steps` that are; `interface`: whose counter is read, if any.

    In the first step ranks meet that were woken one after the other, and memory that others have used comes back
    into the caches.
    """
    contestant.step()
    sent = _bytes_sent(interface)
    begin = time.perf_counter()
    exchanges = [contestant.step() for _ in range(steps)]
    seconds = time.perf_counter() - begin
    sent_after = _bytes_sent(interface)
    told = [exchange for exchange in exchanges if exchange is not None]
    return Turn(
        seconds / steps,
        statistics.fmean(exchange.waited_seconds for exchange in told) if told else None,
        statistics.fmean(exchange.wire_bytes for exchange in told) if told else None,
        None if sent is None or sent_after is None else (sent_after - sent) / steps,
    )


def over_ranks(turns: Sequence[Turn]) -> Turn:
    """What the ranks of a job saw, as one turn: seconds of the slowest rank, bytes of a rank on average."""
    waited = [turn.waited_seconds for turn in turns if turn.waited_seconds is not None]
    wire = [turn.wire_bytes for turn in turns if turn.wire_bytes is not None]
    interface = [turn.interface_bytes for turn in turns if turn.interface_bytes is not None]
    return Turn(
        max(turn.step_seconds for turn in turns),
        max(waited) if waited else None,
        statistics.fmean(wire) if wire else None,
        statistics.fmean(interface) if interface else None,
    )


def digest(contestant: Contestant) -> str:
    """SHA-256 (hex) of the parameters of a contestant's model: equal on all ranks, or these are no replicas."""
    return parameter_hash(dict(contestant.model.named_parameters()))


def _bytes_sent(interface: str | None) -> int | None:
    if interface is None:
        return None
    return int(Path("/sys/class/net", interface, "statistics", "tx_bytes").read_text(encoding="ascii"))
