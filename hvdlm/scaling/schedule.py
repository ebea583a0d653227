"""The gradient exchange of one step played event by event: which bucket is where, and when all have arrived.

The schedule is GradientSync's. The backward pass fills one bucket after the other; buckets take turns on the lanes; on
a lane a bucket goes through its stages one after the other. Lanes share the link, and with the backward pass, where
that computes on them, the cores of the rank. All ranks are taken to be at the same place at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from hvdlm.gradients.auto.forecast import BackwardPass

Kind = Literal["codec", "latency", "link"]

# What communication leaves of the cores at least, however much it wants: schedulers are fair.
_LEFT = 0.1

# How much faster than its rate a link is while it bursts: cores then set its speed.
_BURST_SPEED = 50.0

_NOTHING = 1e-12  # seconds


class Stage(NamedTuple):
    """A part of a bucket's way."""

    kind: Kind
    seconds: float  # if nothing else wants what it needs
    load: float = 0.0  # cores that a stage on the link keeps busy meanwhile


class Cores(NamedTuple):
    """What a rank computes on."""

    available: float  # to this rank alone: below 1 where there are more ranks than cores
    backward: float  # of those, that the backward pass keeps busy: 0 where it runs on a GPU


class Journey(NamedTuple):
    """A bucket's way, in seconds since the backward pass began."""

    full: float
    begin: float  # its lane takes it
    end: float  # its sum is there


@dataclass
class Schedule:
    """How an exchange goes, in seconds since the backward pass began."""

    journeys: list[Journey]
    backward_end: float = 0.0
    link_seconds: float = 0.0  # in which the link carried something
    latency_seconds: float = 0.0  # in which nothing went on but latency
    codec_seconds: float = 0.0  # in which codecs computed, and the link was idle

    @property
    def end(self) -> float:
        """The last gradient is there, and the pass over."""
        return max([self.backward_end, *(journey.end for journey in self.journeys)])

    @property
    def exposed(self) -> float:
        """Seconds of waiting after the backward pass."""
        return self.end - self.backward_end


@dataclass
class _Lane:
    waiting: list[int]  # buckets that it will take, in order
    bucket: int | None = None
    begin: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    left: float = 0.0  # seconds of its stage

    @property
    def kind(self) -> Kind | None:
        return self.stages[0].kind if self.stages else None


class _Speeds(NamedTuple):
    """By what share of its own speed each thing goes on."""

    codec: float
    link: float
    latency: float
    backward: float


def play(
    backward: BackwardPass, stages: Sequence[Sequence[Stage]], lanes: int, cores: Cores, burst: float = 0.0
) -> Schedule:
    """`stages`: of each bucket; `lanes`: how many take buckets in turns.

    `burst`: seconds of the link's time that it carries at once when it was idle as long, as a token bucket does.
    """
    schedule = Schedule([Journey(0, 0, 0)] * len(stages))
    crew = [_Lane([*range(first, len(stages), lanes)]) for first in range(min(lanes, len(stages)))]
    full_at = [0.0] * len(stages)
    filled = 0
    now = done = 0.0  # the time, and how far the backward pass would be by itself
    tokens = burst
    while True:
        while filled < len(stages) and backward.full[filled] <= done + _NOTHING:
            full_at[filled] = now
            filled += 1
        for lane in crew:
            _move_on(lane, now, filled, full_at, stages, schedule)
        is_over = done >= backward.end - _NOTHING
        if is_over and not schedule.backward_end:
            schedule.backward_end = now
        busy = [lane for lane in crew if lane.bucket is not None]
        if is_over and not busy:
            return schedule
        speeds = _speeds(busy, not is_over, cores, _BURST_SPEED if tokens > _NOTHING else 1.0)
        spent = speeds.link * sum(lane.kind == "link" for lane in busy) - 1  # tokens a second, beyond what come
        goal = backward.full[filled] if filled < len(stages) else backward.end
        ends = [lane.left / getattr(speeds, lane.kind or "latency") for lane in busy]
        if spent > _NOTHING:
            ends.append(tokens / spent)
        after = min([*ends, *([] if is_over else [(goal - done) / speeds.backward])])
        _count(schedule, busy, after)
        for lane in busy:
            lane.left -= after * getattr(speeds, lane.kind or "latency")
        tokens = min(burst, max(0.0, tokens - spent * after))
        now += after
        done = min(done + after * speeds.backward, backward.end)


def _speeds(busy: Sequence[_Lane], is_backward: bool, cores: Cores, line: float) -> _Speeds:
    """The link, `line` times as fast as its rate, is shared evenly; cores go first to what drives it, which sleeps most
    of the time.
    """
    on_link = [lane.stages[0] for lane in busy if lane.kind == "link"]
    link = line / max(1, len(on_link))
    load = sum(stage.load for stage in on_link) * link
    most = (1 - _LEFT) * cores.available
    if load > most:
        link, load = link * most / load, most
    wanted = sum(lane.kind == "codec" for lane in busy) + cores.backward * is_backward
    share = min(1.0, (cores.available - load) / wanted) if wanted else 1.0
    return _Speeds(share, link, 1.0, share if cores.backward else 1.0)


def _move_on(
    lane: _Lane,
    now: float,
    filled: int,
    full_at: Sequence[float],
    stages: Sequence[Sequence[Stage]],
    schedule: Schedule,
) -> None:
    """Begins the lane's next stage or bucket, if it has come to the end of one and there is one."""
    while True:
        if lane.bucket is not None:
            while lane.stages and lane.left <= _NOTHING:
                lane.stages = lane.stages[1:]
                lane.left = lane.stages[0].seconds if lane.stages else 0.0
            if lane.stages:
                return
            schedule.journeys[lane.bucket] = Journey(full_at[lane.bucket], lane.begin, now)
            lane.bucket = None
        if not lane.waiting or lane.waiting[0] >= filled:
            return
        lane.bucket, lane.begin = lane.waiting.pop(0), now
        lane.stages = list(stages[lane.bucket])
        lane.left = lane.stages[0].seconds if lane.stages else 0.0


def _count(schedule: Schedule, busy: Sequence[_Lane], seconds: float) -> None:
    kinds = {lane.kind for lane in busy}
    if "link" in kinds:
        schedule.link_seconds += seconds
    elif "codec" in kinds:
        schedule.codec_seconds += seconds
    elif kinds:
        schedule.latency_seconds += seconds
