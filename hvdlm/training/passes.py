"""The forward and backward passes of a step, over a rank's micro-batches, whose gradients are added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hvdlm.comm.work import Work
from hvdlm.training.micro_batches import MicroBatch
from hvdlm.training.model import seed_dropout

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class Passes:
    """Of a trainer whose ranks have the whole model, or the same parts of it at the same time."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, status: Work[int]) -> tuple[list[Tensor], int]:
        """The losses of this rank's micro-batches, sums over tokens; and the tokens over whose mean loss the gradients
        of all ranks are, as `status` tells.

        factor: by what the loss is multiplied that is differentiated.
        """
        trainer = self._trainer
        activity, step = trainer.communicator.activity, trainer.step + 1
        self._seed_dropout()
        losses: list[Tensor] = []
        tokens: int | None = None
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            activity.begin(f"computes micro-batch {number} of step {step}")
            loss = trainer.micro_batch_loss(inputs, targets, factor)
            losses.append(loss.detach())
            trainer.timer.end_phase("forward")
            is_last = number == len(micro_batches)
            if is_last:
                tokens = trainer.wait_for(status)
                trainer.strategy.set_last_micro_batch()  # gradients are final from here on: they are sent when ready
            self._backward(loss, factor, is_last)
            trainer.strategy.end_pass()
            trainer.timer.end_phase("backward")
        if tokens is None:  # this rank has no sequences
            tokens = trainer.wait_for(status)
            trainer.strategy.set_last_micro_batch()
            self._without_sequences()
        return losses, tokens

    def _seed_dropout(self) -> None:
        trainer, config = self._trainer, self._trainer.config
        # Ranks that share a sequence draw alike, unless each has other tokens of it
        divided = trainer.communicator if config.parallel.sequence else trainer.readers
        seed_dropout(config.train.seed, trainer.step, divided.rank)

    def _backward(self, loss: Tensor, factor: float, is_last: bool) -> None:
        """Adds to gradients; those of the last micro-batch are final."""
        (loss * factor).backward()

    def _without_sequences(self) -> None:
        """Instead of a last micro-batch, if this rank has none: it contributes zeros."""
