"""How long a stretch of work took on the device that does it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds between `start` and `stop`, as the host sees them or, on a GPU, as its stream does.

    A GPU works behind the host's back, so its stretch is marked by events in the stream; reading `seconds`
    waits for the second one.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)]
        self._begin = self._end = 0.0

    def start(self) -> None:
        self._begin = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        self._end = time.perf_counter()
        if self._events:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        if not self._events:
            return self._end - self._begin
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000
