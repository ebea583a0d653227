"""`local_steps.every = "auto"`: the fewest steps whose computing hides a round on the link that is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from hvdlm.config import CompressionSection, LocalStepsSection
from hvdlm.gradients.auto.probe import probe_codec_on_channel
from hvdlm.gradients.codecs.registry import codec_factory
from hvdlm.strategies.local_steps.fragment import Fragment
from hvdlm.strategies.local_steps.groups import Groups
from hvdlm.strategies.local_steps.rounds import Rounds, fewest_steps

# Steps that are timed, of which the first ones warm up
TIMED_STEPS = 8
_WARM_UP = 3


class ComputeTimer:
    """Seconds that this rank computes in a step, without its waiting for others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._waited = 0.0
        self._seconds: list[float] = []

    def begin_step(self) -> None:
        self._begin, self._waited = self._now(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done within is not counted."""
        begin = self._now()
        yield
        self._waited += self._now() - begin

    def end_step(self) -> float:
        """The seconds of this step."""
        self._seconds.append(self._now() - self._begin - self._waited)
        return self._seconds[-1]

    def seconds(self) -> float:
        """The median over the steps that were timed, after those that warm up."""
        return statistics.median(self._seconds[_WARM_UP:])

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def round_seconds(groups: Groups, fragments: Sequence[Fragment], compression: CompressionSection) -> float:
    """Seconds for which one round of all fragments uses the links, without encoding and decoding; equal on all ranks.

    Collective.
    """
    make_codec, step = codec_factory(compression.codec), 2 * compression.warmup_steps
    seconds = 0.0
    for bucket in (bucket for fragment in fragments if groups.channels for bucket in fragment.buckets):
        codec = make_codec(bucket, compression)
        cost = probe_codec_on_channel(groups.channels[0], codec, bucket.buffer, step, "probe of a round")
        seconds += cost.communicating
    return groups.everyone.broadcast_object(seconds)


def rounds_of(settings: LocalStepsSection) -> Rounds:
    """With the least interval in the place of one that is still to be chosen, after some steps."""
    if settings.every == "auto":
        return Rounds(1, settings.fragments, 1, max(settings.warmup_steps, TIMED_STEPS))
    return Rounds(settings.every, settings.fragments, settings.overlap, settings.warmup_steps)


def choose(rounds: Rounds, groups: Groups, compute: float, round_: float) -> tuple[Rounds, str]:
    """`rounds` with an interval and an overlap that hide them, and a sentence that says why. Collective.

    `compute`: seconds that this rank computes in a step; the fastest rank counts. `round_`: see `round_seconds`.
    """
    fastest = min(groups.everyone.all_gather_object(compute))
    every, overlap = fewest_steps(fastest, round_, rounds.fragments)
    sentence = (
        f"a round takes {round_ * 1e3:,.0f} ms on the link and a step {fastest * 1e3:,.0f} ms of computing: "
        f"local_steps.every = {every}, local_steps.overlap = {overlap}"
    )
    return replace(rounds, every=every, overlap=overlap), sentence
