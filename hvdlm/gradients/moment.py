"""Instants on the time line of the device that computes."""

from __future__ import annotations

import time

import torch


class Moment:
    """Now, as the host sees it; on a GPU, when the current stream has done all that it was given so far.

    `later - earlier` are seconds. A GPU works behind the host's back: there the difference waits for the later one.
    """

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def __sub__(self, earlier: Moment) -> float:
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000
