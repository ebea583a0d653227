"""A worker that trains by an optimizer of its own for a round, and pushes what it has learned: asynchronous DiLoCo.

Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv:2401.09135; what servers make of it is in
served_optimizer.py. Parameters come from servers at the beginning of each round, and moments stay with the worker from
one to the next.
"""

from __future__ import annotations

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mailbox import Letter
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.optimizer import optimizer_tensors
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.server.strategy import Done, ServedWorker
from hvdlm.strategies.strategy import RankState


class LocalServedWorker(ServedWorker):
    """What it pushes has its tokens over those of the round as weight: the shares of a round have 1 together."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        workers: Communicator,
        group: ServerGroup,
        config: Config,
    ) -> None:
        """`optimizer`: this worker's own, over the parameters of `model`."""
        super().__init__(model, workers, group, config)
        self._model, self.optimizer = model, optimizer
        self._given = [torch.empty_like(each.weights) for each in self._partitions]  # with which a round begins

    def ask(self, done: Done | None, is_stop_requested: bool) -> Letter:
        self._letters.is_patient = True  # others may be in the midst of a round
        try:
            return super().ask(done, is_stop_requested)
        finally:
            self._letters.is_patient = False

    @torch.no_grad()
    def begin_task(self, task: int, round_: int) -> None:
        super().begin_task(task, round_)
        self.arrive()
        for given, partition in zip(self._given, self._partitions, strict=True):
            given.copy_(partition.weights)

    @torch.no_grad()
    def take_differences(self, weight: float) -> None:
        """What is pushed at the end of the task is `weight` times what parameters have changed by since it began.

        Raises HvdlmError if they are not finite: servers would move along that at once.
        """
        for given, partition in zip(self._given, self._partitions, strict=True):
            torch.sub(partition.weights, given, out=partition.buffer).mul_(weight)
            if not partition.buffer.isfinite().all():
                raise HvdlmError(
                    f"worker {self._group.mailbox.rank} has come to parameters that are not finite by its own steps: "
                    "lower optimizer.lr, and resume from the last checkpoint"
                )
            for parameter, slot in zip(partition.parameters, partition.slots, strict=True):
                parameter.grad = slot

    # ---- state

    @property
    def ranks_are_equal(self) -> bool:
        return False

    def rank_state(self) -> RankState:
        residuals = {f"difference_{name}": each for name, each in super().rank_state().summed.items()}
        return RankState(summed=residuals, averaged=optimizer_tensors(self.optimizer, self._model))
