"""Timestamps, spans, and the phases of a step, as the device that computes sees them."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class Timestamp:
    """Now on the host; on a GPU, the instant at which the current stream has finished what was queued so far.

    `later - earlier` is in seconds. On a GPU the subtraction blocks until the later event has happened.
    """

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def __sub__(self, earlier: Timestamp) -> float:
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


class Span(NamedTuple):
    """Something that lasted from `begin` to `end`, in seconds of one clock."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def total_seconds(spans: list[Span]) -> float:
    """Sum of the lengths of `spans`."""
    return sum(span.seconds for span in spans)


class StepTimer:
    """The phases of one step: "data", "forward", "backward", "wait" (for other ranks) and "optimizer".

    On a GPU the lengths are known only when it has finished the phases: reading them blocks until then.
    """

    def __init__(self, device: torch.device) -> None:
        """The step and its first phase begin now."""
        self.begin = time.perf_counter()
        self._device = device
        self._start = Timestamp(device)
        self._phase_ends: list[tuple[str, Timestamp]] = []

    def end_phase(self, name: str) -> None:
        """The phase since the last call, or since the beginning, was `name`; the next phase begins now."""
        self._phase_ends.append((name, Timestamp(self._device)))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; phases of one name are added up."""
        sums: dict[str, float] = {}
        for span in self.spans():
            sums[span.name] = sums.get(span.name, 0.0) + span.seconds
        return sums

    def spans(self) -> list[Span]:
        """The phases in order; their times are seconds since the step began."""
        ends = [end - self._start for _, end in self._phase_ends]
        names = [name for name, _ in self._phase_ends]
        return [Span(*phase) for phase in zip(names, [0.0, *ends[:-1]], ends, strict=True)]
