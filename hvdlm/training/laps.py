"""What one step did, one thing after the other, on the time line of the device that computes."""

from __future__ import annotations

import time

import torch

from hvdlm.gradients.moment import Moment


class Laps:
    """The stretches of one step: "data", "forward", "backward", "wait" (for other ranks) and "optimizer".

    On a GPU their lengths are known only when it has come to their ends: reading them waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        """The step begins now."""
        self.begin = time.perf_counter()
        self._device = device
        self._laps: list[tuple[str, Moment]] = []
        self._start = Moment(device)

    def end(self, name: str) -> None:
        """What was done since the last call, or the beginning, was this."""
        self._laps.append((name, Moment(self._device)))

    def seconds(self) -> dict[str, float]:
        """All laps of one name together."""
        sums: dict[str, float] = {}
        for name, begin, end in self.spans():
            sums[name] = sums.get(name, 0.0) + end - begin
        return sums

    def spans(self) -> list[tuple[str, float, float]]:
        """Name, begin and end of each lap in order, in seconds since the step began."""
        ends = [moment - self._start for _, moment in self._laps]
        return [(name, begin, end) for (name, _), begin, end in zip(self._laps, [0.0, *ends[:-1]], ends, strict=True)]
