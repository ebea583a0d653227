"""A server that is a process of its own, but not the first one: it acts on the orders of that (independent.py)."""

from __future__ import annotations

from collections.abc import Callable

from hvdlm.comm.activity import Activity
from hvdlm.comm.mailbox import Letter
from hvdlm.comm.server_mailbox import ServerMailbox
from hvdlm.config import ServerSection
from hvdlm.strategies.server.following import FollowingServer
from hvdlm.strategies.server.group import NONE, Kind, ServerGroup
from hvdlm.strategies.server.independent import Run
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.rounds import ServedRounds


class IndependentFollower(FollowingServer):
    """Keeps its part of the model, and takes what workers push of it, who join and leave at any time."""

    def __init__(
        self,
        owned: OwnedParameters,
        group: ServerGroup,
        activity: Activity,
        settings: ServerSection,
        rounds: ServedRounds,
        stop_requested: Callable[[], bool],
        run: Run,
    ) -> None:
        super().__init__(owned, group, activity, settings, rounds)
        assert isinstance(group.mailbox, ServerMailbox)
        self._workers, self._run, self._stop_requested = group.mailbox, run, stop_requested
        self._has_asked_to_stop = False
        self._has_left: set[int] = set()  # workers, of whom more may come
        self._is_over = False

    def serve(self, step: int) -> bool:
        """Goes on after so many steps, until the first server ends; returns whether the last one has been made."""
        self._begin_after(step)
        self._activity.idle()
        while not self._is_over:
            letter = self._next()
            if letter is None:
                self._has_asked_to_stop = True
                self._mailbox.post(self._group.server_ranks[:1], (Kind.DONE, NONE, NONE, 1))
            elif letter.source in self._group.server_ranks:
                self.act(letter)
            elif letter.source not in self._has_left and self._is_expected(letter):
                self.answer(letter)
            else:
                self._leave_out(letter.source)
        return self.version >= self._rounds.count

    def _next(self) -> Letter | None:
        """The next letter; None if this process is to stop, and the first server does not know."""
        return self._mailbox.receive_unless(
            lambda: self._stop_requested() and not self._has_asked_to_stop, "the first server"
        )

    def _is_expected(self, letter: Letter) -> bool:
        """Whether a worker may send this: parts of one task, each once, until the first server has said what becomes of
        it.
        """
        kind, bucket, task, _ = letter.header
        others = any(worker == letter.source and pushed != task for worker, pushed in self._pushed)
        is_new = bucket not in self._pushed.get((letter.source, task), ())
        return kind == Kind.PUSH and 0 <= bucket < self._owned.buckets and is_new and not others

    def _leave_out(self, worker: int) -> None:
        self._has_left.add(worker)
        self._workers.disconnect(worker)
        for each in [key for key in self._pushed if key[0] == worker]:
            del self._pushed[each]

    def act(self, order: Letter) -> None:
        kind, first, second, third = order.header
        if kind == Kind.LEFT:
            self._leave_out(first)
        elif kind == Kind.TASK:
            self._run.train_on(first, third)
        elif kind == Kind.BOUNDARY:
            self._is_over = bool(second)
            self._run.at_boundary(first, self._is_over)
        else:
            super().act(order)

    def step(self, factor: float, rate: float) -> None:
        self._run.before_update()
        super().step(factor, rate)
