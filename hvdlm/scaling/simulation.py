"""The gradient exchange of one step, simulated event by event: where each bucket is, and when all have arrived.

The order of events is that of GradientSync. The backward pass makes one bucket ready after the other; channel c of n
exchanges buckets c, c + n, c + 2n, ...; on a channel a bucket goes through its stages one after the other. Channels
share the link and, if the backward pass computes on the CPU, the cores of the rank. All ranks are assumed to be at the
same stage at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from hvdlm.gradients.auto.forecast import BackwardPass

Kind = Literal["codec", "latency", "link"]

# The share of the cores that communication cannot take: operating systems schedule threads fairly.
_MIN_COMPUTE_SHARE = 0.1

# Speed of a link during a burst, over its rate: then only the cores limit it.
_BURST_SPEED = 50.0

_EPSILON = 1e-12  # seconds


class Stage(NamedTuple):
    """A part of a bucket's exchange."""

    kind: Kind
    seconds: float  # if nothing else uses the same resource
    load: float = 0.0  # cores that a stage on the link keeps busy


class Cores(NamedTuple):
    """The cores of one rank."""

    available: float  # below 1 where there are more ranks than cores
    backward: float  # those that the backward pass keeps busy; 0: it runs on a GPU


class BucketTimes(NamedTuple):
    """When a bucket is exchanged, in seconds since the start of the backward pass."""

    ready: float
    start: float
    end: float


@dataclass
class Schedule:
    """The result of a simulation; times are in seconds since the start of the backward pass."""

    buckets: list[BucketTimes]
    backward_end: float = 0.0
    link_seconds: float = 0.0  # for which the link was busy
    latency_seconds: float = 0.0  # for which there was latency and nothing else
    codec_seconds: float = 0.0  # for which codecs computed and the link was idle

    @property
    def end(self) -> float:
        """When the backward pass has ended and the last gradient has arrived."""
        return max([self.backward_end, *(bucket.end for bucket in self.buckets)])

    @property
    def exposed(self) -> float:
        """Seconds of waiting after the backward pass."""
        return self.end - self.backward_end


@dataclass
class _Channel:
    queue: list[int]  # buckets that it will exchange, in order
    bucket: int | None = None
    start: float = 0.0  # of the bucket
    stages: list[Stage] = field(default_factory=list)  # that are left of the bucket, the current one first
    left: float = 0.0  # seconds of the current stage

    @property
    def kind(self) -> Kind | None:
        return self.stages[0].kind if self.stages else None


class _Speeds(NamedTuple):
    """The speed of each kind of work, over its speed when nothing else uses the same resource."""

    codec: float
    link: float
    latency: float
    backward: float


def simulate(
    backward: BackwardPass, stages: Sequence[Sequence[Stage]], channel_count: int, cores: Cores, burst: float = 0.0
) -> Schedule:
    """Simulates the exchange of buckets, each with its `stages`.

    `burst`: seconds of the link's time that it carries at once after it was idle for as long: a token bucket.
    """
    schedule = Schedule([BucketTimes(0, 0, 0)] * len(stages))
    used = min(channel_count, len(stages))
    channels = [_Channel([*range(first, len(stages), channel_count)]) for first in range(used)]
    ready_at = [0.0] * len(stages)
    ready_count = 0
    now = done = 0.0  # the time, and the progress of the backward pass, in its own seconds
    tokens = burst
    while True:
        while ready_count < len(stages) and backward.ready[ready_count] <= done + _EPSILON:
            ready_at[ready_count] = now
            ready_count += 1
        for channel in channels:
            _advance(channel, now, ready_count, ready_at, stages, schedule)
        is_over = done >= backward.end - _EPSILON
        if is_over and not schedule.backward_end:
            schedule.backward_end = now
        busy = [channel for channel in channels if channel.bucket is not None]
        if is_over and not busy:
            return schedule
        speeds = _speeds(busy, not is_over, cores, _BURST_SPEED if tokens > _EPSILON else 1.0)
        spent = speeds.link * sum(channel.kind == "link" for channel in busy) - 1  # tokens per second, less those added
        next_ready = backward.ready[ready_count] if ready_count < len(stages) else backward.end
        waits = [channel.left / getattr(speeds, channel.kind or "latency") for channel in busy]
        if spent > _EPSILON:
            waits.append(tokens / spent)
        if not is_over:
            waits.append((next_ready - done) / speeds.backward)
        seconds = min(waits)  # until the next event
        _count(schedule, busy, seconds)
        for channel in busy:
            channel.left -= seconds * getattr(speeds, channel.kind or "latency")
        tokens = min(burst, max(0.0, tokens - spent * seconds))
        now += seconds
        done = min(done + seconds * speeds.backward, backward.end)


def _speeds(busy: Sequence[_Channel], is_backward: bool, cores: Cores, link_speed: float) -> _Speeds:
    """Shares the link, of speed `link_speed`, evenly among stages, and the cores.

    Threads that drive the link get cores first, as they sleep most of the time.
    """
    on_link = [channel.stages[0] for channel in busy if channel.kind == "link"]
    link = link_speed / max(1, len(on_link))
    load = sum(stage.load for stage in on_link) * link
    max_load = (1 - _MIN_COMPUTE_SHARE) * cores.available
    if load > max_load:
        link, load = link * max_load / load, max_load
    wanted = sum(channel.kind == "codec" for channel in busy) + cores.backward * is_backward
    share = min(1.0, (cores.available - load) / wanted) if wanted else 1.0
    return _Speeds(share, link, 1.0, share if cores.backward else 1.0)


def _advance(
    channel: _Channel,
    now: float,
    ready_count: int,
    ready_at: Sequence[float],
    stages: Sequence[Sequence[Stage]],
    schedule: Schedule,
) -> None:
    """Starts the channel's next stage if the current one has ended, and its next bucket if one is ready."""
    while True:
        if channel.bucket is not None:
            while channel.stages and channel.left <= _EPSILON:
                channel.stages = channel.stages[1:]
                channel.left = channel.stages[0].seconds if channel.stages else 0.0
            if channel.stages:
                return
            schedule.buckets[channel.bucket] = BucketTimes(ready_at[channel.bucket], channel.start, now)
            channel.bucket = None
        if not channel.queue or channel.queue[0] >= ready_count:
            return
        channel.bucket, channel.start = channel.queue.pop(0), now
        channel.stages = list(stages[channel.bucket])
        channel.left = channel.stages[0].seconds if channel.stages else 0.0


def _count(schedule: Schedule, busy: Sequence[_Channel], seconds: float) -> None:
    kinds = {channel.kind for channel in busy}
    if "link" in kinds:
        schedule.link_seconds += seconds
    elif "codec" in kinds:
        schedule.codec_seconds += seconds
    elif kinds:
        schedule.latency_seconds += seconds
