"""The local steps of a round of asynchronous servers: whoever has a share of it trains by an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hvdlm.errors import HvdlmError
from hvdlm.strategies.optimizer import clip_factor, set_learning_rate
from hvdlm.strategies.penalties import add_penalties_
from hvdlm.strategies.server.rounds import ServedRounds
from hvdlm.training.schedule import learning_rate

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class LocalRound:
    """Steps of a trainer's model on the batches of a round, from `first` on, of each of which it has a share."""

    def __init__(self, trainer: Trainer, optimizer: torch.optim.Optimizer, first: int) -> None:
        """`optimizer`: over the parameters of the model. Its moments stay from round to round."""
        self._trainer, self._optimizer = trainer, optimizer
        self._parameters = [each for each in trainer.model.parameters() if each.requires_grad]
        self._batches = ServedRounds.of_run(trainer.config).batches_from(first)

    def train(self, make: Callable[[int], tuple[float, int]]) -> tuple[float, int]:
        """Makes a step on each batch; returns the loss, a sum over the tokens of all, and their number.

        `make`: adds the gradients of this rank's share of a batch, as `ShareTraining.make` does, and returns as much.
        Raises HvdlmError if gradients are not finite too often.
        """
        loss, tokens = 0.0, 0
        for batch in self._batches:
            for parameter in self._parameters:
                parameter.grad = None
            own_loss, own_tokens = make(batch)
            self._step(batch, own_tokens)
            loss, tokens = loss + own_loss, tokens + own_tokens
        return loss, tokens

    def weight(self, tokens: int) -> float:
        """Of what was learned from so many tokens, over those of all batches of the round."""
        before = self._trainer.config.tokens_before
        return tokens / (before(self._batches.stop) - before(self._batches.start))

    def _step(self, batch: int, tokens: int) -> None:
        """As `Trainer.train_step` ends, for a rank alone."""
        trainer, config = self._trainer, self._trainer.config
        trainer.step = batch
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        if not tokens or not gradients:
            return
        unscale = trainer.nominal_tokens / tokens  # to the gradients of the mean loss
        norm = torch.nn.utils.get_total_norm(gradients) * unscale
        if trainer.skipped.skips(norm):
            if trainer.skipped.error:
                raise HvdlmError(trainer.skipped.error)
            return
        factor = unscale * clip_factor(float(norm), config.optimizer.clip_norm)
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        add_penalties_((each for each in self._parameters if each.dim() >= 2), config.optimizer)
        set_learning_rate(self._optimizer, learning_rate(batch, trainer.ending.last_step, config.optimizer))
        self._optimizer.step()
        trainer.model.update_low_precision_weights()
