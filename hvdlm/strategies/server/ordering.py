"""The first server of asynchronous training: it hands out tasks, and decides what counts in which step.

A step adds as many shares as a global batch has, whichever come first: so batch size, schedule and number of steps are
those of synchronous training (Dutta et al., "Slow and Stale Gradients Can Win the Race", AISTATS 2018: K-batch-async).
With local steps the same is true of rounds (rounds.py), but that parameters move along each share when it comes: a step
then moves them along the momentum (served_optimizer.py). A share that was computed with parameters more than
`server.max_staleness` versions old does not count, and is trained on again. At a boundary, where a checkpoint or a
validation is due, all tasks of the rounds before have been done and no other: there the run is one that any ranks can
go on with.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdlm.comm.activity import Activity
from hvdlm.comm.mailbox import Letter
from hvdlm.config import ServerSection
from hvdlm.errors import HvdlmError
from hvdlm.strategies.optimizer import clip_factor
from hvdlm.strategies.server.following import FollowingServer
from hvdlm.strategies.server.group import NONE, Kind, ServerGroup
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.rounds import ServedRounds
from hvdlm.strategies.server.tasks import Tasks

# The weight of a worker's newest share in how late it is
_NEWEST = 0.2

# Of each step, in the letter that tells of it, float64
LINE = ("step", "loss", "tokens", "grad_norm", "dropped", "staleness", "workers", "seconds")


@dataclass(frozen=True)
class StepPlan:
    """What the first server knows of a run."""

    rounds: ServedRounds
    shares: int  # of a round, as tasks
    tokens_before: Callable[[int], int]  # of a batch, by those of a round a worker divides what it pushes
    rate: Callable[[int], float]  # by which servers make the version after this one
    boundary_after: Callable[[int], int]  # the first version after this one that all workers wait for
    seconds_between: float  # after which all workers are to wait for one another in any case
    moves_at_once: bool  # parameters move along what is pushed when it comes, and not along the mean of a version's
    clip_norm: float  # 0: what is pushed is not clipped
    max_skipped: int  # rounds in a row that may be left out


class OrderingServer(FollowingServer):
    """It gives the others orders, and follows them itself at once."""

    def __init__(
        self,
        owned: OwnedParameters,
        group: ServerGroup,
        activity: Activity,
        settings: ServerSection,
        plan: StepPlan,
        stop_requested: Callable[[], bool],
        workers: Iterable[int],
    ) -> None:
        """`workers`: those that are there from the start."""
        super().__init__(owned, group, activity, settings, plan.rounds)
        self._plan, self._stop_requested = plan, stop_requested
        self._followers = group.server_ranks[1:]
        self._living, self._shares = set(workers), plan.shares
        self._tasks: Tasks | None = None  # once the version is known with which training begins
        self._end = 0  # the boundary, a version: tasks of rounds before it are handed out
        self._is_at_boundary = True  # all workers have come there, or wait for the first tasks after it
        self._stops = False
        self._idle: list[int] = []  # workers that want a task, in the order in which they have asked
        self._lateness: dict[int, float] = {}  # by worker: versions, a mean that follows its last shares
        self._missing: dict[tuple[int, int], int] = {}  # by worker and task: servers that have not all of it
        self._early: dict[tuple[int, int], Letter] = {}  # by worker and task: it is done, but for that
        self._aside: deque[Letter] = deque()
        self._dropped = self._skipped_in_a_row = 0
        self._lines: list[list[float]] = []  # of steps since the last boundary, where all get them: some may have died
        self._told = 0  # lines that the first worker has got before
        self._begun = self._last_boundary = time.monotonic()
        self._begin_sum()

    def _begin_sum(self) -> None:
        self._added, self._loss, self._tokens, self._weighted, self._ages = 0, 0.0, 0.0, 0.0, 0

    def run(self) -> Letter:
        self._activity.idle()
        while True:
            letter = self._next()
            if letter is not None and letter.kind == Kind.END:
                return letter
            self._proceed(letter)

    def _proceed(self, letter: Letter | None) -> None:
        """Does what a letter asks, or what has become necessary without one, and hands out tasks."""
        if letter is None:
            self._give_back_of_dead()
        elif letter.kind == Kind.DONE:
            self._receive(letter)
        elif letter.kind == Kind.HAVE:
            self._note(letter)
        else:
            self.answer(letter)
        if self._stop_requested():
            self._stop()
        if time.monotonic() - self._last_boundary > self._plan.seconds_between:
            self._end_soon()
        self._hand_out()

    def _next(self) -> Letter | None:
        """The next letter; None if a worker has died meanwhile, or this rank is to stop."""
        if self._aside:
            return self._aside.popleft()

        def is_due() -> bool:
            stops = self._stop_requested() and not self._stops
            return stops or bool(self._living & set(self._mailbox.dead()))

        return self._mailbox.receive_unless(is_due, "the workers")

    # ---- tasks

    def _receive(self, letter: Letter) -> None:
        """A worker has pushed what it had to do, and wants more."""
        _, task, version, stops = letter.header
        if self._tasks is None:
            self._tasks, self._end = Tasks(self.version, self._shares), self.version
        if stops:
            self._stop()
        worker = letter.source
        if worker not in self._living:
            return
        if self._missing.get((worker, task), len(self._followers)) and task != NONE:
            self._early[worker, task] = letter
            return
        if task != NONE:
            self._missing.pop((worker, task), None)
            age = self.version - version
            if age > self._settings.max_staleness:
                self._dropped += 1
                self._order((Kind.DROP, task, worker))
                self._tasks.give_back(worker)
            else:
                self._tasks.done(worker)
                self._lateness[worker] = (1 - _NEWEST) * self._lateness.get(worker, 0.0) + _NEWEST * age
                self._order((Kind.ADD, task, worker, version))
                loss, tokens = letter.data.view(torch.float64).tolist()
                self._count(loss, tokens, task, age)
        self._idle.append(worker)

    def _note(self, letter: Letter) -> None:
        """Another server has what a worker has pushed."""
        _, task, worker, _ = letter.header
        self._missing[worker, task] = self._missing.get((worker, task), len(self._followers)) - 1
        if not self._missing[worker, task] and (done := self._early.pop((worker, task), None)):
            self._receive(done)

    def _count(self, loss: float, tokens: float, task: int, age: int) -> None:
        # What is pushed is divided by the nominal tokens of its round, which may differ from those of this one
        batches = self._batches_of(task)
        nominal = self._plan.tokens_before(batches.stop) - self._plan.tokens_before(batches.start)
        self._weighted += tokens / nominal
        self._loss, self._tokens, self._ages = self._loss + loss, self._tokens + tokens, self._ages + age
        self._added += 1
        if self._added == self._shares:
            self._make_step()

    def _batches_of(self, task: int) -> range:
        return self._rounds.batches_from(max(self._first, self._rounds.end(task // self._shares)))

    def _stop(self) -> None:
        """Training ends as soon as the rounds that have been begun are done."""
        if not self._stops and self._tasks is not None:
            self._stops = True
            self._end_soon()

    def _end_soon(self) -> None:
        """The next boundary is after the rounds that have been begun."""
        if self._tasks is not None and not self._is_at_boundary:
            self._end = min(self._end, max(self._tasks.rounds_begun, self.version))

    def _give_back_of_dead(self) -> None:
        for worker in sorted(self._living & set(self._mailbox.dead())):
            self._leave_out(worker)
        if not self._living:
            raise HvdlmError("no worker is left: go on with --resume latest")

    def _leave_out(self, worker: int) -> int | None:
        """A worker gets no more tasks; returns the one that it held, which others now get."""
        self._living.remove(worker)
        self._idle = [each for each in self._idle if each != worker]
        task = None if self._tasks is None else self._tasks.give_back(worker)
        if task is not None:
            self._early.pop((worker, task), None)
            self._missing.pop((worker, task), None)
            self._order((Kind.DROP, task, worker))
        return task

    def _hand_out(self) -> None:
        if self._tasks is None:
            return
        if self.version == self._end and not self._tasks.held:
            if len(self._idle) < len(self._living):
                return  # until all have come here
            if not self._is_at_boundary or self._stops:
                self._tell_boundary()
                return
            self._is_at_boundary, self._begun = False, time.monotonic()
            self._end = self._plan.boundary_after(self.version)
        # Beginning with the round under way, in which nothing is late, until the warm-up is over
        is_over = self._rounds.end(self.version) >= self._settings.warmup_steps
        end = self._end if is_over else min(self._end, self.version + 1)
        while self._idle:
            task = self._tasks.hand_out(self._idle[0], end)
            if task is None:
                return
            worker = self._idle.pop(0)
            ahead = self._lateness.get(worker, 0.0) if self._settings.predict else 0.0
            self._order((Kind.SERVE, worker, round(1000 * ahead)))
            header = (Kind.TASK, task, self.version, self._batches_of(task).start)
            self._mailbox.post([worker], header, self._lines_for(worker))

    def _tell_boundary(self) -> None:
        is_end = self._stops or self.version >= self._rounds.count
        for worker in self._idle:
            self._order((Kind.SERVE, worker))
            header = (Kind.BOUNDARY, self._rounds.end(self.version), int(is_end), len(self._living))
            self._mailbox.post([worker], header, torch.tensor(self._lines, dtype=torch.float64))
        self._lines, self._told = [], 0
        self._idle, self._is_at_boundary, self._last_boundary = [], True, time.monotonic()

    def _lines_for(self, worker: int) -> Tensor:
        """New lines of the log, for the first worker that lives."""
        if worker != min(self._living):
            return torch.empty(0, dtype=torch.float64)
        lines, self._told = self._lines[self._told :], len(self._lines)
        return torch.tensor(lines, dtype=torch.float64)

    # ---- steps

    def _make_step(self) -> None:
        version, step = self.version, self._rounds.end(self.version + 1)
        norms = [self._owned.norm()]
        self._order((Kind.SUM,))
        while len(norms) < self._group.servers:
            letter = self._mailbox.receive("the other servers", self._followers)
            if letter.kind == Kind.NORM:
                norms.append(float(letter.data.view(torch.float64)))
            else:
                self._aside.append(letter)
        # Of sums that were each divided by the nominal tokens of a round: by the true ones, of the shares that count
        unscale = 1 / self._weighted if self._weighted else math.nan
        if self._plan.moves_at_once:  # with the weights that they had then
            unscale = 1.0
        norm = math.sqrt(math.fsum(each * each for each in norms)) * unscale
        rate, factor = self._plan.rate(version), 0.0
        if math.isfinite(norm) and self._weighted:
            factor = unscale * clip_factor(norm, self._plan.clip_norm)
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self._plan.max_skipped:
                raise HvdlmError(
                    f"a gradient is not finite at step {step}, the last of {self._skipped_in_a_row} in a row: "
                    "lower optimizer.lr, or resume from the last checkpoint with other settings"
                )
        self._order((Kind.STEP, version), torch.tensor([factor, rate], dtype=torch.float64))
        seconds, self._begun = time.monotonic() - self._begun, time.monotonic()
        numbers = self._loss, self._tokens, norm, self._dropped, self._ages / self._shares, len(self._living)
        self._lines.append([step, *numbers, seconds])
        self._begin_sum()

    def _order(self, header: tuple[int, ...], data: Tensor | None = None) -> None:
        """Tells the other servers, then does it."""
        self._mailbox.post(self._followers, header, data)
        if header[0] != Kind.SUM:
            kind, first, second, third = (*header, 0, 0, 0)[:4]
            content = torch.empty(0, dtype=torch.uint8) if data is None else data.view(torch.uint8)
            self.act(Letter(self._mailbox.rank, (kind, first, second, third), content))
