"""Validation of a trainer's model, and of its moving average."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from hvdlm.errors import JobError
from hvdlm.training.evaluation import evaluate
from hvdlm.training.preemption import Preemption

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def validate(trainer: Trainer, preemption: Preemption) -> bool:
    """Writes the validation loss; or returns False, as soon as a signal to any rank asks to stop. Collective.

    Raises JobError if the loss is not finite.
    """
    if not trainer.data.validation.shards:
        trainer.write("event", message="no validation: the data set was prepared without it")
        return True
    run = partial(
        evaluate,
        trainer.model,
        trainer.data,
        trainer.communicator,
        trainer.config.train.micro_batch_size,
        trainer.config.train.evaluate_sequences,
        lambda: preemption.requested,
        trainer.pipeline,
    )
    with trainer.strategy.evaluation_parameters():
        result = run()
    averaged = trainer.ema.evaluate(run) if result is not None else None
    if result is not None and averaged is not None:
        trainer.write("eval", loss=result.loss, accuracy=result.accuracy, **averaged, tokens=trainer.tokens_done())
        if not math.isfinite(result.loss):
            raise JobError(
                f"the validation loss is {result.loss} after step {trainer.step}: the model has diverged; lower "
                "optimizer.lr, and resume from an earlier checkpoint"
            )
    return averaged is not None
