"""The loop of a server in asynchronous training that acts on the first one's orders.

All servers add the same pushes to the same steps, and send a worker parameters of the same version, since the first one
decides and the others do what it says, in its order. It lets a push count once all of them have their parts of it.
"""

from __future__ import annotations

import torch

from hvdlm.comm.activity import Activity
from hvdlm.comm.mailbox import Letter
from hvdlm.config import ServerSection
from hvdlm.strategies.server.group import Kind, ServerGroup
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.rounds import ServedRounds
from hvdlm.strategies.server.server import Server

_ORDERS = frozenset({Kind.ADD, Kind.DROP, Kind.SUM, Kind.STEP, Kind.SERVE})


class FollowingServer(Server):
    """Answers letters until the workers say that it is over."""

    def __init__(
        self,
        owned: OwnedParameters,
        group: ServerGroup,
        activity: Activity,
        settings: ServerSection,
        rounds: ServedRounds,
    ) -> None:
        super().__init__(owned, group, activity)
        self._settings, self._rounds = settings, rounds
        self.version = 0  # rounds
        self._first = 0  # the batch with which training begins here
        self._pushed: dict[tuple[int, int], dict[int, Letter]] = {}  # by worker and task, then by bucket

    def run(self) -> Letter:
        """Returns the letter that says so."""
        self._activity.idle()  # workers may take any time, each its own
        while True:
            letter = self._mailbox.receive("the workers", is_patient=True)
            if letter.kind == Kind.END:
                return letter
            self.answer(letter)

    def answer(self, letter: Letter) -> None:
        """Does what a letter asks."""
        kind, number, second, _ = letter.header
        if kind == Kind.PUSH:
            self._pushed.setdefault((letter.source, second), {})[number] = letter
            if self._has(letter.source, second) and self._group.own_server:
                self._mailbox.post(self._group.server_ranks[:1], (Kind.HAVE, second, letter.source))
        elif kind in _ORDERS:
            self.act(letter)
        elif kind == Kind.PUBLISH:
            self._begin_after(number)
            for worker in self._group.worker_ranks:
                self._serve(worker)
        else:
            self.answer_about_kept(letter)

    def _begin_after(self, batches: int) -> None:
        """Training begins here after so many batches."""
        self._first, self.version = batches, self._rounds.version_after(batches)

    def _has(self, worker: int, task: int) -> bool:
        """Whether all of what a worker has to push for a task is here."""
        return len(self._pushed.get((worker, task), ())) == self._owned.buckets

    def act(self, order: Letter) -> None:
        """Does what the first server has decided."""
        kind, first, second, _ = order.header
        if kind == Kind.ADD:
            for bucket, letter in sorted(self._pushed.pop((second, first)).items()):
                self._owned.add(bucket, letter.data, letter.header[3])
        elif kind == Kind.DROP:
            self._pushed.pop((second, first), None)
        elif kind == Kind.SUM:
            norm = torch.tensor(self._owned.norm(), dtype=torch.float64)
            self._mailbox.post(self._group.server_ranks[:1], (Kind.NORM,), norm)
        elif kind == Kind.STEP:
            self.step(*order.data.view(torch.float64).tolist())
        elif kind == Kind.SERVE:
            self._serve(first, second / 1000)

    def step(self, factor: float, rate: float) -> None:
        """The next version of the parameters, which is the same again if `factor` is 0."""
        if factor:
            self._owned.step(factor, rate)
        self._owned.zero_grad()
        self.version += 1

    def _serve(self, worker: int, ahead: float = 0.0) -> None:
        for bucket in self._owned.order:
            self._mailbox.post([worker], (Kind.WEIGHTS, bucket, self.version), self._owned.weights(bucket, ahead))
