"""Servers that are processes of their own: they alone keep the model, and workers join and leave at any time.

What counts in which step the first one decides as that of a job does. A batch has a fixed number of shares, so steps,
samples and the learning rate depend on no number of workers; without any it waits. A worker that leaves, dies, or
takes too long for a share gives it back. At a boundary nobody holds a share: servers save and validate, while workers
wait for the next task.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from hvdlm.comm.activity import Activity
from hvdlm.comm.failure import RunningTime
from hvdlm.comm.mailbox import Letter
from hvdlm.comm.server_mailbox import ServerMailbox
from hvdlm.config import ServerSection
from hvdlm.strategies.server.group import NONE, Kind, ServerGroup
from hvdlm.strategies.server.ordering import LINE, OrderingServer, StepPlan
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.tasks import Tasks

# Of what a worker says of a share, float64: loss and tokens
_BYTES_OF_DONE = 16


class Run(Protocol):
    """What the process does beside serving, `train_on` and `at_boundary` together with those of all other servers."""

    def train_on(self, task: int, first: int) -> tuple[float, int]:
        """Adds to this server's sums what a worker would push of a share, whose first batch this is; returns its loss,
        a sum over tokens, and their number.
        """

    def before_update(self) -> None:
        """Parameters are about to change."""

    def after_step(self, line: dict[str, float]) -> None:
        """A step has been made; `line`: what `ordering.LINE` names."""

    def at_boundary(self, step: int, is_end: bool) -> None:
        """All shares of the first `step` batches have counted, and no other. `is_end`: of training here."""

    def tell(self, sentence: str) -> None:
        """Something has happened."""


class IndependentServer(OrderingServer):
    """The first one. Serves from a step to the last one, or until it is asked to stop."""

    def __init__(
        self,
        owned: OwnedParameters,
        group: ServerGroup,
        activity: Activity,
        settings: ServerSection,
        plan: StepPlan,
        stop_requested: Callable[[], bool],
        run: Run,
        patience: float,
    ) -> None:
        """`patience`: seconds for a share."""
        super().__init__(owned, group, activity, settings, plan, stop_requested, ())
        assert isinstance(group.mailbox, ServerMailbox)
        self._workers, self._run, self._patience = group.mailbox, run, patience
        self._clock = RunningTime()
        self._expelled: set[int] = set()
        self._since: dict[int, float] = {}  # when each worker was given the task that it holds
        self._is_over = False
        self._has_told_to_wait = False

    def serve(self, step: int) -> bool:
        """Goes on after so many steps; returns whether the last one has been made."""
        self._begin_after(step)
        self._end = self.version
        self._tasks = Tasks(self.version, self._shares)
        self._is_over = self.version >= self._rounds.count
        self._activity.idle()
        while not self._is_over:
            self._proceed(self._next())
        return self.version >= self._rounds.count

    def _next(self) -> Letter | None:
        """The next letter; None if a worker has gone meanwhile or takes too long, or this process is to stop."""
        self._tell_if_alone()
        if self._aside:
            return self._aside.popleft()

        def is_due() -> bool:
            stops = self._stop_requested() and not self._stops
            return stops or bool(self._gone()) or self._late() is not None

        return self._mailbox.receive_unless(is_due, "workers")

    def _tell_if_alone(self) -> None:
        if self._living:
            self._has_told_to_wait = False
        elif not self._has_told_to_wait:
            self._has_told_to_wait = True
            self._run.tell("no worker is there: waiting until one joins")

    def _gone(self) -> set[int]:
        return self._living & set(self._mailbox.dead())

    def _late(self) -> int | None:
        """A worker that has held its task for too long."""
        now = self._clock.seconds()
        return next((worker for worker, since in self._since.items() if now - since > self._patience), None)

    def _proceed(self, letter: Letter | None) -> None:
        if letter is not None and letter.source in self._expelled:
            return
        if letter is not None and letter.kind == Kind.DONE and letter.source in self._followers:
            self._stop()
            letter = None
        if letter is not None and not self._is_expected(letter):
            self._expel(letter.source, "it has sent what no worker sends")
            letter = None
        if letter is None and (late := self._late()) is not None:
            of_each = f" for each of {self._rounds.every} steps" if self._rounds.every > 1 else ""
            self._expel(late, f"it takes longer than {self._patience:g} s (comm.timeout{of_each}) for a share")
        super()._proceed(letter)
        if self._stops and not self._living and not self._is_over:
            self._complete_batches()

    def _expel(self, worker: int, reason: str) -> None:
        self._expelled.add(worker)
        self._workers.disconnect(worker)
        if worker in self._living:
            self._leave_out_and_tell(worker, f"is disconnected, for {reason}")
        else:
            self._order((Kind.LEFT, worker))

    def _is_expected(self, letter: Letter) -> bool:
        """Whether a worker may send this now; or another server, which never sends anything else."""
        assert self._tasks is not None
        kind, first, second, leaves = letter.header
        if letter.source in self._followers:
            return True
        held = self._tasks.held.get(letter.source)
        if kind == Kind.PUSH:
            return held == second and 0 <= first < self._owned.buckets
        if kind != Kind.DONE:
            return False
        if first == NONE:
            return bool(leaves) or (held is None and letter.source not in self._idle)
        is_whole = self._has(letter.source, first) and len(letter.data) == _BYTES_OF_DONE
        return held == first and is_whole and 0 <= second <= self.version

    def _receive(self, letter: Letter) -> None:
        kind, task, version, leaves = letter.header
        worker = letter.source
        if worker not in self._living:
            if leaves:
                return
            self._living.add(worker)
            self._run.tell(f"{self._workers.name_of(worker)} joins: {self._count_workers()}")
        super()._receive(letter._replace(header=(kind, task, version, 0)))
        self._since.pop(worker, None)
        if leaves:
            self._leave_out_and_tell(worker, "leaves")

    def _note(self, letter: Letter) -> None:
        if letter.header[2] in self._living:
            super()._note(letter)

    def _give_back_of_dead(self) -> None:
        for worker in sorted(self._gone()):
            self._leave_out_and_tell(worker, "has gone")

    def _leave_out_and_tell(self, worker: int, what: str) -> None:
        task = self._leave_out(worker)
        self._order((Kind.LEFT, worker))
        self._since.pop(worker, None)
        again = "" if task is None else f", and a share of batch {self._batches_of(task).start} is handed out again"
        self._run.tell(f"{self._workers.name_of(worker)} {what}{again}: {self._count_workers()}")

    def _count_workers(self) -> str:
        count = len(self._living)
        return f"{count} worker{'' if count == 1 else 's'}"

    def _hand_out(self) -> None:
        super()._hand_out()
        assert self._tasks is not None
        for worker in self._tasks.held.keys() - self._since.keys():
            self._since[worker] = self._clock.seconds()

    def act(self, order: Letter) -> None:
        if order.kind == Kind.BOUNDARY:
            self._run.at_boundary(order.header[1], bool(order.header[2]))
        elif order.kind != Kind.LEFT:  # what it has pushed has been dropped
            super().act(order)

    def step(self, factor: float, rate: float) -> None:
        self._run.before_update()
        super().step(factor, rate)

    def _make_step(self) -> None:
        super()._make_step()
        lines, self._lines = self._lines, []
        for line in lines:
            self._run.after_step(dict(zip(LINE, line, strict=True)))

    def _tell_boundary(self) -> None:
        is_end, step = self._stops or self.version >= self._rounds.count, self._rounds.end(self.version)
        self._order((Kind.BOUNDARY, step, int(is_end)))
        if not is_end and self._stop_requested():  # meanwhile
            is_end = True
            self._order((Kind.BOUNDARY, step, int(is_end)))
        self._is_at_boundary, self._last_boundary = True, time.monotonic()
        self._is_over = is_end
        if not is_end:
            self._hand_out()

    def _complete_batches(self) -> None:
        """Makes what is left of the batches that have been begun, where nobody else is there to: what is saved is at a
        boundary.
        """
        assert self._tasks is not None
        end = self._rounds.end(self._end)
        self._run.tell(f"no worker is there: this process completes the batches before {end}")
        while self.version < self._end:
            task = self._tasks.hand_out(self._mailbox.rank, self._end)
            assert task is not None
            first = self._batches_of(task).start
            self._mailbox.post(self._followers, (Kind.TASK, task, self.version, first))
            loss, tokens = self._run.train_on(task, first)
            self._tasks.done(self._mailbox.rank)
            self._count(loss, tokens, task, 0)
        self._tell_boundary()
