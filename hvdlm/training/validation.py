"""Validation in a run: which steps it follows, and what is written of it."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from hvdlm.errors import JobError
from hvdlm.training.due import recurs
from hvdlm.training.evaluation import evaluate
from hvdlm.training.preemption import Preemption

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class Validation:
    """Of `train.evaluate_every`, and after the last step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def follows(self, step: int) -> bool:
        """Whether a validation follows a step."""
        trainer, config = self._trainer, self._trainer.config
        recurs_here = recurs(step, config.train.evaluate_every, config.steps_of_served_round)
        return step == trainer.ending.last_step or recurs_here

    def was_cut_off(self, step: int) -> bool:
        """Whether what was found after a step should be written, and is not: rank 0 has died before. Collective."""
        return self._trainer.communicator.broadcast_object(self._lacks_records(step))

    def _lacks_records(self, step: int) -> bool:
        """On rank 0, which has the log."""
        trainer, metrics = self._trainer, self._trainer.metrics
        if metrics is None or trainer.stop or step == 0 or not self.follows(step):
            return False
        kinds = {"eval": bool(trainer.data.validation.shards), "tasks": bool(trainer.task_scores)}
        return any(is_due and not metrics.holds(kind, step) for kind, is_due in kinds.items())

    def run(self, preemption: Preemption) -> bool:
        """Writes the validation loss; or returns False, as soon as a signal to any rank asks to stop.

        Raises JobError if the loss is not finite.
        """
        trainer = self._trainer
        if not trainer.data.validation.shards:
            trainer.write("event", message="no validation: the data set was prepared without it")
            return True
        sizes = trainer.config.train.micro_batch_size, trainer.config.train.evaluate_sequences
        run = partial(
            evaluate,
            trainer.model,
            trainer.data,
            trainer.communicator,
            *sizes,
            lambda: preemption.requested,
            trainer.strategy.evaluation_is_collective,
            trainer.readers,
            trainer.mesh.is_first("tensor"),
            trainer.pipeline,
        )
        with trainer.strategy.evaluation_parameters():
            result = run()
        averaged = trainer.ema.evaluate(run) if result is not None else None
        if result is not None and averaged is not None:
            of_sources = {f"{source}/loss": own.loss for source, own in result.of_sources.items()}
            numbers = {"loss": result.loss, "accuracy": result.accuracy, **averaged, **of_sources}
            trainer.write("eval", **numbers, tokens=trainer.tokens_done)
            if not math.isfinite(result.loss):
                raise JobError(
                    f"the validation loss is {result.loss} after step {trainer.step}: the model has diverged; lower "
                    "optimizer.lr, and resume from an earlier checkpoint"
                )
        return averaged is not None
