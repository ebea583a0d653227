"""The loop of a server that waits in each step for the gradients of all workers.

It adds them in the order of workers, whatever the order in which they come, so that a run can be repeated bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hvdlm.comm.activity import Activity
from hvdlm.comm.mailbox import Letter
from hvdlm.strategies.server.group import Kind, ServerGroup
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.server import Server
from hvdlm.timing import Span


class SynchronousServer(Server):
    """Answers the letters of workers until they say that it is over."""

    def __init__(
        self, owned: OwnedParameters, group: ServerGroup, activity: Activity, stop_requested: Callable[[], bool]
    ) -> None:
        """`stop_requested`: whether this rank was asked to stop; workers are told."""
        super().__init__(owned, group, activity)
        self._stop_requested = stop_requested
        self._step = 0
        self._begin_step()
        self.spans: list[Span] = []  # of letters that were answered since the first gradients of this step
        self._early: list[Letter] = []  # of workers that know sooner than this server that a step is left out

    def _begin_step(self) -> None:
        self._owned.zero_grad()
        self._pushed: list[dict[int, Letter]] = [{} for _ in range(self._owned.buckets)]  # and not added, by worker
        self._added = [0] * self._owned.buckets  # workers whose gradients have been

    def run(self) -> Letter:
        """Returns the letter that says so."""
        while True:
            is_under_way = any(self._added) or any(self._pushed)
            if is_under_way:
                self._activity.begin_wait(f"the workers in step {self._step + 1}")
            else:
                self._activity.idle()  # workers may validate, or save
            letter = self._mailbox.receive("the workers", is_patient=not is_under_way)
            if letter.kind == Kind.END:
                return letter
            if letter.kind == Kind.PUSH and not is_under_way:
                self.spans = []
            begin = time.perf_counter()
            self._answer(letter)
            self.spans.append(Span(_name(letter), begin, time.perf_counter()))

    def _answer(self, letter: Letter) -> None:
        kind, number, _, _ = letter.header
        if kind == Kind.PUSH:
            self._push(letter)
        elif kind == Kind.APPLY:
            factor, rate = letter.data.view(torch.float64).tolist()
            self._owned.step(factor, rate)
            self._publish()
            self._end_step()
        elif kind == Kind.SKIP:
            self._end_step()
        elif kind == Kind.PUBLISH:
            self._step = number
            self._publish()
        else:
            self.answer_about_kept(letter)

    def _push(self, letter: Letter) -> None:
        _, bucket, step, _ = letter.header
        if step != self._step:
            self._early.append(letter)
            return
        waiting = self._pushed[bucket]
        waiting[letter.source] = letter
        while (worker := self._added[bucket]) in waiting:
            self._owned.add(bucket, waiting.pop(worker).data, step)
            self._added[bucket] += 1
        if min(self._added) == self._group.workers:
            norm = torch.tensor(self._owned.norm(), dtype=torch.float64)
            self._mailbox.post(self._group.worker_ranks, (Kind.NORM, int(self._stop_requested())), norm)

    def _publish(self) -> None:
        for bucket in self._owned.order:
            self._mailbox.post(self._group.worker_ranks, (Kind.WEIGHTS, bucket), self._owned.weights(bucket))

    def _end_step(self) -> None:
        self._step += 1
        self._begin_step()
        early, self._early = self._early, []
        for letter in early:
            self._push(letter)


def _name(letter: Letter) -> str:
    kind, number, _, _ = letter.header
    return f"bucket {number + 1} of rank {letter.source}" if kind == Kind.PUSH else Kind(kind).name.lower()
