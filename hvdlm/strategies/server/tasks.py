"""Which worker trains on what, where the first server hands it out: shares of rounds (rounds.py), each once.

Task n is share n % `shares` of round n // `shares`: that share of each of its batches. What a worker has not done when
it dies, and what came too late, is handed out again before anything new.
"""

from __future__ import annotations

import heapq


class Tasks:
    """Numbers of tasks, in order, but for those that come back."""

    def __init__(self, version: int, shares: int) -> None:
        """Begins with the first share of the round that begins with this version of parameters."""
        self._shares, self._next = shares, version * shares
        self._returned: list[int] = []
        self.held: dict[int, int] = {}  # by worker

    def hand_out(self, worker: int, end: int) -> int | None:
        """A task for a worker that holds none, of a round before `end`; None if there is none for now."""
        if self._returned:
            task = heapq.heappop(self._returned)
        elif self._next < end * self._shares:
            task, self._next = self._next, self._next + 1
        else:
            return None
        self.held[worker] = task
        return task

    def done(self, worker: int) -> int:
        """The worker's task has been trained on: it is not handed out again."""
        return self.held.pop(worker)

    def give_back(self, worker: int) -> int | None:
        """The worker's task, if it holds one, is to be handed out again."""
        task = self.held.pop(worker, None)
        if task is not None:
            heapq.heappush(self._returned, task)
        return task

    @property
    def rounds_begun(self) -> int:
        """Rounds of which some share has been handed out, and all before."""
        return -(-self._next // self._shares)
