"""`local_steps.by = "seconds"`: which local steps a slow group leaves out, so that a round takes as long on each."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

import torch
from torch import Tensor

# A group that is slower than the fastest by less takes part in every step: times differ by some percent from step to
# step on equal machines.
_AS_FAST = 1.1

# Steps of this rank over which the median is told
_TIMED_STEPS = 8


class Pace:
    """The seconds of a step on each group, and which of them take part in the next one: equal on all ranks.

    A group that needs n times as long as the fastest one takes part in one step of n, spread evenly.
    """

    def __init__(self, group: int, count: int) -> None:
        """`group`: this rank's, of `count`."""
        self._group = group
        self._own: deque[float] = deque(maxlen=_TIMED_STEPS)  # seconds of this rank's steps
        self._seconds = [0.0] * count  # of a step on each group, as told in the last round; 0: none was
        self._due = [0.0] * count  # the part of a step that each group has still to make
        self.left_out = [0] * count  # steps that each group has left out
        self.steps = 0

    def takes_part(self) -> bool:
        """Whether this rank's group takes part in the next step. Once a step, on every rank."""
        fastest = min((seconds for seconds in self._seconds if seconds), default=0.0)
        for group, seconds in enumerate(self._seconds):
            self._due[group] += 1.0 if seconds <= fastest * _AS_FAST else fastest / seconds
        taking_part = [due >= 1 for due in self._due]
        for group, takes_part in enumerate(taking_part):
            self._due[group] -= takes_part
            self.left_out[group] += not takes_part
        self.steps += 1
        return taking_part[self._group]

    def add(self, seconds: float) -> None:
        """Adds a step in which this rank took part: seconds without waiting for others."""
        self._own.append(seconds)

    def tell(self, is_leader: bool) -> Tensor:
        """What this rank adds to what all are told, (count,) int64: its group's microseconds, of the leader alone."""
        message = torch.zeros(len(self._seconds), dtype=torch.int64)
        if is_leader and self._own:
            message[self._group] = max(1, round(median(self._own) * 1e6))
        return message

    def hear(self, told: Tensor) -> None:
        """The sum over all ranks of what they have told. A group that tells nothing is as fast as it was."""
        for group, microseconds in enumerate(told.tolist()):
            if microseconds:
                self._seconds[group] = microseconds / 1e6

    def share_left_out(self) -> float:
        """Of the steps of all groups together."""
        return sum(self.left_out) / (self.steps * len(self.left_out)) if self.steps else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks."""
        return {"seconds": self._seconds, "due": self._due, "left_out": self.left_out, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what as many groups have saved."""
        self._seconds, self._due, self.left_out = (list(state[name]) for name in ("seconds", "due", "left_out"))
        self.steps = state["steps"]
