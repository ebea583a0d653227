"""Tests that all-reduces are exact, and measures latency and bandwidth between two ranks and over all ranks."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hvdlm.comm.communicator import DTYPES, Communicator

# Elements of the tested sums, some of them not divisible by any chunk size. The largest takes 2 MiB as int64, which
# travel in two seconds at 10 Mbit/s.
_SUM_LENGTHS = (1, 7, 1000, 65_537, 262_147)

_ROUND_TRIPS = 30
_WARM_UP = 5  # of these; the first messages open connections

# The size of messages grows until one takes at least this long; then messages of that size are measured for a second.
_MIN_BYTES, _MAX_BYTES = 256 * 1024, 4 * 2**20
_MIN_MESSAGE_SECONDS = 0.05
_MEASURED_SECONDS = 1.0
_MIN_MESSAGES, _MAX_MESSAGES = 4, 20


@dataclass(frozen=True)
class PointToPoint:
    """Messages between two ranks: median `latency` in seconds and median `bandwidth` in bytes per second."""

    ranks: tuple[int, int]
    operation: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class AllReduce:
    """All-reduces of `nbytes` bytes over `size` ranks: `seconds` is the median time on the slowest rank."""

    size: int
    nbytes: int
    seconds: float

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second on the slowest link, comparable across numbers of ranks (nccl-tests, doc/PERFORMANCE.md)."""
        return 2 * (self.size - 1) / self.size * self.nbytes / self.seconds


def wrong_sums(communicator: Communicator) -> list[list[str]]:
    """For each rank, the all-reduces whose result was wrong, such as "float16 of 7 elements". Collective.

    Element i of rank r is 1 + (i + r) % 3. With more than 64 ranks the sum would overflow uint8 and be rounded in
    bfloat16, so there only every `stride`-th rank has such a value at an element, and the others have 0.
    """
    size = communicator.size
    stride = -(-size // 64)
    index = torch.arange(3 * stride)  # the elements repeat after these
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


def measure_point_to_point(communicator: Communicator, first: int, second: int) -> PointToPoint:
    """Measures messages between two ranks, or broadcasts to all if the engine has no send. Collective."""
    by_send = communicator.supports("send")
    result = None
    if not by_send or communicator.rank in (first, second):
        latency = _latency(communicator, first, second)
        nbytes, count = _MIN_BYTES, _MIN_MESSAGES
        while True:
            seconds = _time_per_message(communicator, first, second, nbytes, count)
            # The receiver decides and sends its decision to the sender.
            decision = torch.tensor(_next_size(nbytes, count, seconds))
            nbytes, count = _transfer(communicator, decision, second, first).tolist()
            if not count:
                break
        operation = "send and receive" if by_send else "broadcast to all ranks"
        result = PointToPoint((first, second), operation, latency, nbytes / seconds)
    return communicator.broadcast_object(result, root=second)  # type: ignore[return-value]


def measure_all_reduce(communicator: Communicator) -> AllReduce:
    """Measures float32 sums over all ranks. Collective."""
    nbytes, count = _MIN_BYTES, _MIN_MESSAGES
    while True:
        seconds = []
        tensor = torch.zeros(nbytes // 4)
        for _ in range(count):
            start = time.perf_counter()
            communicator.all_reduce_(tensor)
            seconds.append(time.perf_counter() - start)
        slowest = max(communicator.all_gather_object(statistics.median(seconds)))
        following, count = _next_size(nbytes, count, slowest)
        if not count:
            return AllReduce(communicator.size, nbytes, slowest)
        nbytes = following


def _next_size(nbytes: int, count: int, seconds: float) -> tuple[int, int]:
    """Size and number of the next messages, after `count` of `nbytes` that took `seconds` each; number 0: the end."""
    if count > _MIN_MESSAGES:
        return nbytes, 0
    if seconds < _MIN_MESSAGE_SECONDS and nbytes < _MAX_BYTES:
        return nbytes * 4, _MIN_MESSAGES
    return nbytes, max(_MIN_MESSAGES + 1, min(_MAX_MESSAGES, round(_MEASURED_SECONDS / seconds)))


def _latency(communicator: Communicator, first: int, second: int) -> float:
    """Half of the median round trip of 8 bytes, in seconds."""
    message = torch.zeros(8, dtype=torch.uint8)
    trips = []
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter()
        _transfer(communicator, message, first, second)
        _transfer(communicator, message, second, first)
        trips.append((time.perf_counter() - start) / 2)
    return statistics.median(trips[_WARM_UP:])


def _time_per_message(communicator: Communicator, first: int, second: int, nbytes: int, count: int) -> float:
    """Median seconds between the arrivals of consecutive messages; only valid on `second`, the receiver.

    A rate-limited or buffered link delivers the first bytes faster. They belong to the first message, whose time is not
    counted.
    """
    message = torch.zeros(nbytes, dtype=torch.uint8)
    ends = []
    for _ in range(count):
        _transfer(communicator, message, first, second)
        ends.append(time.perf_counter())
    return statistics.median(end - start for start, end in pairwise(ends))


def _transfer(communicator: Communicator, message: Tensor, source: int, destination: int) -> Tensor:
    """Copies the tensor `message` of rank `source` to that of rank `destination`."""
    if not communicator.supports("send"):
        return communicator.broadcast_(message, source)
    if communicator.rank == source:
        communicator.send(message, destination)
        return message
    return communicator.receive_(message, source)
