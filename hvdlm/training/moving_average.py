"""The exponential moving average of parameters over steps (EMA), `train.ema`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdlm.errors import HvdlmError
from hvdlm.strategies.update_loops import move_
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.evaluation import Evaluation

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


_PREFIX = "ema."  # of names in optimizer.safetensors


class MovingAverage:
    """After every update of the parameters: average = d average + (1 - d) parameters.

    d is `train.ema`, and (1 + t) / (10 + t) as long as that is less, after t steps: otherwise the parameters with which
    training begins would be e^-1 of the average even after 1 / (1 - d) steps. It is computed on every rank, from
    parameters that are equal, so that any rank can go on. Without `train.ema` nothing is kept.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._decay = trainer.config.train.ema
        named = trainer.parameters if self._decay else {}
        self._averages = {name: parameter.detach().clone() for name, parameter in named.items()}

    def reset(self) -> None:
        """The average is that of the parameters as they are, alone."""
        for name, parameter in self._trainer.parameters.items() if self._decay else ():
            self._averages[name].copy_(parameter.detach())

    @torch.no_grad()
    def update(self) -> None:
        """After the update of the parameters in the step under way."""
        if self._averages:
            step = self._trainer.step
            decay = min(self._decay, (1 + step) / (10 + step))
            for average, parameter in zip(self._averages.values(), self._trainer.parameters.values(), strict=True):
                move_(average, parameter, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by name, equal on all ranks: views, to be saved, or to be filled."""
        return {f"{_PREFIX}{name}": average for name, average in self._averages.items()}

    def evaluate(self, evaluate: Callable[[], Evaluation | None]) -> dict[str, float] | None:
        """What a validation's record is to say of the averages; None if `evaluate`, of the model, was stopped."""
        if not self._decay:
            return {}
        with self._trainer.strategy.replaced(self._averages):
            result = evaluate()
        return None if result is None else {"ema_loss": result.loss}


def weights_of(checkpoint: Checkpoint, averaged: bool) -> dict[str, Tensor]:
    """The parameters of a checkpoint by name, float32, on the CPU; or their moving averages.

    Raises HvdlmError if it has none, or if parameters are not finite.
    """
    if not averaged:
        return checkpoint.model()
    state = checkpoint.optimizer()
    averages = {name.removeprefix(_PREFIX): each for name, each in state.items() if name.startswith(_PREFIX)}
    if not averages:
        raise HvdlmError(
            f"{checkpoint.path} has no moving average of weights: leave out --ema, or train with train.ema"
        )
    return averages
