"""The gradients of shares of batches, which servers hand out to workers that do not wait for one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hvdlm.comm.mailbox import Letter
from hvdlm.comm.rank_errors import on_all_ranks
from hvdlm.data.loader import SequenceReader
from hvdlm.data.sampler import rank_part
from hvdlm.strategies.server.strategy import Done, ServedWorker
from hvdlm.targets import IGNORE
from hvdlm.training.micro_batches import divide
from hvdlm.training.model import seed_dropout

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def _nothing() -> None:
    pass


class ShareTraining:
    """By the model of a trainer. Task n is share n % `shares` of batch n // `shares`."""

    def __init__(self, trainer: Trainer, shares: int) -> None:
        """Collective. Raises JobError on all ranks if the data set is too small."""
        self._trainer, self._shares = trainer, shares
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
        """Pushes the gradients of what a TASK is about. `before_pass`: as of `make`."""
        strategy = self._trainer.strategy
        assert isinstance(strategy, ServedWorker)
        _, task, version, _ = order.header
        strategy.begin_task(task)
        loss, tokens = self.make(task, before_pass, strategy.set_last_micro_batch)
        strategy.end_task()
        return Done(task, version, loss, tokens)

    def make(
        self,
        task: int,
        before_pass: Callable[[], None] = _nothing,
        before_last_backward: Callable[[], None] = _nothing,
    ) -> tuple[float, int]:
        """Adds the gradients of a task to those of the model's parameters, divided by the tokens of a batch of which
        every one counts; returns the loss, a sum over tokens, and their number. `before_pass`: called before each
        forward pass, which it keeps from being made by an error.
        """
        trainer = self._trainer
        number, share = divmod(task, self._shares)
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
