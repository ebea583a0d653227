"""Are sums exact, how long does a message take, and how much goes through: within a node, between nodes, over all."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hvdlm.comm.communicator import DTYPES, Communicator

# Elements: one, some, and numbers that no chunk size divides; the largest is 2 MiB of int64, two seconds at 10 Mbit/s.
_SUM_LENGTHS = (1, 7, 1000, 65_537, 262_147)

_ROUND_TRIPS = 30
_WARM_UP = 5  # of these, which make connections

# A message grows from the first size to the last until it takes that many seconds; then so many seconds of them count.
_SMALLEST, _LARGEST = 256 * 1024, 4 * 2**20  # bytes
_LONG_ENOUGH = 0.05
_SECONDS = 1.0
_FEWEST, _MOST = 4, 20  # messages


@dataclass(frozen=True)
class Exchange:
    """Messages between two ranks: `latency` of one in seconds, `bandwidth` in bytes a second; medians."""

    ranks: tuple[int, int]
    operation: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class AllReduce:
    """The median all-reduce of `nbytes` bytes by `size` ranks, of which the slowest took `seconds`."""

    size: int
    nbytes: int
    seconds: float

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second through the slowest link, whatever the number of ranks (nccl-tests, doc/PERFORMANCE.md)."""
        return 2 * (self.size - 1) / self.size * self.nbytes / self.seconds


def wrong_sums(communicator: Communicator) -> list[list[str]]:
    """By rank, the all-reduces that gave it anything but the sum of integers: "float16 of 7 elements". Collective.

    Element i of rank r is 1 + (i + r) % 3, or 0 where more than 64 ranks would add up to what uint8 cannot hold or
    bfloat16 would round: then only each `stride`-th rank gives to an element, others to the next.
    """
    size = communicator.size
    stride = -(-size // 64)
    index = torch.arange(3 * stride)  # after which the elements begin anew
    rows = torch.stack([(1 + (index + rank) % 3) * ((index + rank) % stride == 0) for rank in range(size)])
    wrong = []
    for dtype in sorted(DTYPES, key=str):
        for length in _SUM_LENGTHS:
            own, expected = (
                row.to(dtype).repeat(-(-length // len(row)))[:length] for row in (rows[communicator.rank], rows.sum(0))
            )
            if not torch.equal(communicator.all_reduce_(own), expected):
                wrong.append(f"{str(dtype).removeprefix('torch.')} of {length} element{'s' if length > 1 else ''}")
    return communicator.all_gather_object(wrong)


def measure_exchange(communicator: Communicator, first: int, second: int) -> Exchange:
    """Messages between two ranks, by broadcasts to all where the engine has no send. Collective."""
    by_send = communicator.supports("send")
    result = None
    if not by_send or communicator.rank in (first, second):
        latency = _latency(communicator, first, second)
        nbytes, count = _SMALLEST, _FEWEST
        while True:
            gap = _gap(communicator, first, second, nbytes, count)
            # The one who receives decides; the other hears of it.
            decision = torch.tensor(_next(nbytes, count, gap))
            nbytes, count = _move(communicator, decision, second, first).tolist()
            if not count:
                break
        operation = "send and receive" if by_send else "broadcast to all ranks"
        result = Exchange((first, second), operation, latency, nbytes / gap)
    return communicator.broadcast_object(result, root=second)  # type: ignore[return-value]


def measure_all_reduce(communicator: Communicator) -> AllReduce:
    """float32 sums over all ranks. Collective."""
    nbytes, count = _SMALLEST, _FEWEST
    while True:
        seconds = []
        tensor = torch.zeros(nbytes // 4)
        for _ in range(count):
            start = time.perf_counter()
            communicator.all_reduce_(tensor)
            seconds.append(time.perf_counter() - start)
        slowest = max(communicator.all_gather_object(statistics.median(seconds)))
        following, count = _next(nbytes, count, slowest)
        if not count:
            return AllReduce(communicator.size, nbytes, slowest)
        nbytes = following


def _next(nbytes: int, count: int, seconds: float) -> tuple[int, int]:
    """Bytes and number of the next messages, after `count` of `nbytes` that took `seconds` each; none at the end."""
    if count > _FEWEST:
        return nbytes, 0
    if seconds < _LONG_ENOUGH and nbytes < _LARGEST:
        return nbytes * 4, _FEWEST
    return nbytes, max(_FEWEST + 1, min(_MOST, round(_SECONDS / seconds)))


def _latency(communicator: Communicator, first: int, second: int) -> float:
    """Seconds from rank to rank: half of a round trip of 8 bytes."""
    message = torch.zeros(8, dtype=torch.uint8)
    trips = []
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter()
        _move(communicator, message, first, second)
        _move(communicator, message, second, first)
        trips.append((time.perf_counter() - start) / 2)
    return statistics.median(trips[_WARM_UP:])


def _gap(communicator: Communicator, first: int, second: int, nbytes: int, count: int) -> float:
    """Seconds between the ends of messages from `first` that follow one another; what counts is how `second` sees it.

    A shaped or buffered link lets the first bytes pass for nothing: they are in the first message, before any gap.
    """
    message = torch.zeros(nbytes, dtype=torch.uint8)
    ends = []
    for _ in range(count):
        _move(communicator, message, first, second)
        ends.append(time.perf_counter())
    return statistics.median(end - start for start, end in pairwise(ends))


def _move(communicator: Communicator, message: Tensor, source: int, destination: int) -> Tensor:
    """Copies `message` of one rank into that of another."""
    if not communicator.supports("send"):
        return communicator.broadcast_(message, source)
    if communicator.rank == source:
        communicator.send(message, destination)
        return message
    return communicator.receive_(message, source)
