"""What workers that do not wait for one another make of shares of batches, which servers hand out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdlm.comm.mailbox import Letter
from hvdlm.comm.rank_errors import on_all_ranks
from hvdlm.data.loader import SequenceReader
from hvdlm.data.sampler import rank_part
from hvdlm.strategies.optimizer import make_optimizer
from hvdlm.strategies.server.local_worker import LocalServedWorker
from hvdlm.strategies.server.strategy import Done, ServedWorker
from hvdlm.targets import IGNORE
from hvdlm.training.local_round import LocalRound
from hvdlm.training.micro_batches import divide
from hvdlm.training.model import seed_dropout

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def _nothing() -> None:
    pass


class ShareTraining:
    """By the model of a trainer. Task n is share n % `shares` of the batches of round n // `shares`."""

    def __init__(self, trainer: Trainer, shares: int) -> None:
        """Collective. Raises JobError on all ranks if the data set is too small."""
        self._trainer, self._shares = trainer, shares
        self._optimizer: torch.optim.Optimizer | None = None  # of local steps of a server that has no worker left
        config = trainer.config
        self._reader = on_all_ranks(
            trainer.communicator,
            lambda: SequenceReader(
                trainer.data,
                config.model.context_length,
                config.train.batch_sizes,
                config.train.seed,
                token_dropout=config.data.token_dropout,
            ),
        )

    def push(self, order: Letter, before_pass: Callable[[], None] = _nothing) -> Done:
        """Pushes the gradients of what a TASK is about, or what a round of local steps on it has learned.
        `before_pass`: as of `make`.
        """
        strategy = self._trainer.strategy
        assert isinstance(strategy, ServedWorker)
        _, task, version, first = order.header
        round_, share = divmod(task, self._shares)
        strategy.begin_task(task, round_)
        if isinstance(strategy, LocalServedWorker):
            local = LocalRound(self._trainer, strategy.optimizer, first)
            loss, tokens = local.train(lambda batch: self.make(batch, share, before_pass))
            strategy.take_differences(local.weight(tokens))
        else:
            loss, tokens = self.make(first, share, before_pass, strategy.set_last_micro_batch)
        strategy.end_task()
        return Done(task, version, loss, tokens)

    def make_on_server(self, task: int, first: int) -> tuple[dict[str, Tensor], float, int]:
        """What a worker would push of a task whose first batch this is, by the names of parameters, and what `make` of
        all its batches returns. The model stays as it is.
        """
        trainer, share = self._trainer, task % self._shares
        named = dict(trainer.model.named_parameters())
        if not trainer.config.local_steps.every:
            loss, tokens = self.make(first, share)
            return {name: each.grad for name, each in named.items() if each.grad is not None}, loss, tokens
        if self._optimizer is None:
            self._optimizer = make_optimizer(trainer.model, trainer.config.optimizer)
        given = {name: each.detach().clone() for name, each in named.items()}
        local = LocalRound(trainer, self._optimizer, first)
        loss, tokens = local.train(lambda batch: self.make(batch, share))
        weight, differences = local.weight(tokens), {}
        for name, each in named.items():
            differences[name] = (each.detach() - given[name]) * weight
            each.detach().copy_(given[name])
        return differences, loss, tokens

    def make(
        self,
        number: int,
        share: int,
        before_pass: Callable[[], None] = _nothing,
        before_last_backward: Callable[[], None] = _nothing,
    ) -> tuple[float, int]:
        """Adds the gradients of a share of a batch to those of the model's parameters, divided by the tokens of a batch
        of which every one counts; returns the loss, a sum over tokens, and their number. `before_pass`: called before
        each forward pass, which it keeps from being made by an error.
        """
        trainer = self._trainer
        trainer.communicator.activity.begin(f"computes a share of batch {number}")
        sizes, config = trainer.batch_sizes, trainer.config
        own = [(number, place) for place in rank_part(sizes.size(number), share, self._shares)]
        batch = self._reader.read(number, own)
        seed_dropout(config.train.seed, number, share)
        factor = 1 / (sizes.size(number) * config.model.context_length)
        micro_batches, losses = divide(batch, config.train.micro_batch_size, trainer.device), list[Tensor]()
        for count, (inputs, targets) in enumerate(micro_batches, start=1):
            before_pass()
            loss = trainer.micro_batch_loss(inputs, targets, factor)
            losses.append(loss.detach())
            if count == len(micro_batches):
                before_last_backward()
            (loss * factor).backward()
        return sum(map(float, losses)), int((batch.targets != IGNORE).sum())
