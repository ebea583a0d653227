"""When training ends: after `train.steps`, or before, by tokens, by time, or because validation does not improve."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

logger = logging.getLogger(__name__)


class EndOfTraining:
    """Knows the last step, equal on all ranks.

    Steps and tokens are known from the start. Time is that of rank 0 in all starts of a run, each from when it has read
    its checkpoint; it asks the others to end with a step, as for a checkpoint. Validations are those in metrics.jsonl.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._settings = trainer, trainer.config.train
        self.last_step = trainer.config.planned_steps
        self._limit = self._settings.max_seconds
        self._before = 0.0  # seconds of earlier starts
        self._begun: float | None = None
        self._first_step = 0  # of this start
        self._budget_is_spent = False  # of privacy, by the last step

    @property
    def seconds(self) -> float:
        """For which the run has trained, by the clock of this rank."""
        return self._before + (0.0 if self._begun is None else time.monotonic() - self._begun)

    def restore(self, seconds: float) -> None:
        """Goes on with a run that has trained for so long."""
        self._before = seconds
        self._begun = None if self._begun is None else time.monotonic()

    def begin(self) -> None:
        """Training begins now; not at all if it has ended before. Collective."""
        trainer = self._trainer
        self._begun, self._first_step = time.monotonic(), trainer.step
        self.keep_to_budget()
        if self._before >= self._limit:
            self.end_by_time()
        self.end_if_not_better(steps_later=0)
        if trainer.step >= self.last_step and trainer.communicator.rank == 0:
            limits = "train.max_tokens, train.max_time or train.patience"
            if self._budget_is_spent:
                limits = "privacy.target_epsilon"
            what = limits if trainer.step < self._settings.steps else "train.steps"
            logger.info("all %d steps are done: nothing to train; raise %s to go on", self.last_step, what)

    def keep_to_budget(self) -> None:
        """The last step is one within `privacy.target_epsilon`, if there is one. Collective."""
        privacy = self._trainer.privacy
        if privacy:
            planned, self.last_step = self.last_step, privacy.last_step(self.last_step)
            self._budget_is_spent |= self.last_step < planned

    def asks(self) -> bool:
        """Whether this rank, rank 0, asks all to end with the step under way."""
        return self._trainer.communicator.rank == 0 and self.seconds >= self._limit

    def end(self, why: str, steps_later: int = 0) -> None:
        """The step that was done last is the last one, or one that is so many later, unless one before is so anyway."""
        trainer = self._trainer
        if trainer.step + steps_later < self.last_step:
            self.last_step, trainer.due.end = trainer.step + steps_later, why
            if trainer.step > self._first_step:  # it has had a line if one was due anyway
                trainer.due.log |= not steps_later and trainer.step % trainer.config.log.every > 0

    def end_by_time(self) -> None:
        self.end(f"train.max_time = {self._settings.max_time} is over")

    def end_if_not_better(self, steps_later: int) -> None:
        """Ends training if the last `train.patience` validations were no better than one before. Collective.

        `steps_later`: 1 for local steps, whose rounds under way end with a last step that is planned.
        """
        patience, metrics = self._settings.patience, self._trainer.metrics
        if not patience:
            return
        losses = [] if metrics is None else [loss for _, loss in sorted(metrics.losses.items())]
        is_over = len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
        if self._trainer.communicator.broadcast_object(is_over):
            self.end(f"the validation loss was not better train.patience = {patience} times in a row", steps_later)

    def tell(self) -> None:
        """Says why training has ended before `train.steps`, if it has."""
        if self.last_step <= self._trainer.step < self._settings.steps and not self._trainer.stop:
            why = self._trainer.due.end or f"train.max_tokens = {self._settings.max_tokens:,} is reached"
            if self._budget_is_spent and not self._trainer.due.end:
                budget = self._trainer.config.privacy.target_epsilon
                why = f"another step would spend more than privacy.target_epsilon = {budget:g}"
            self._trainer.write("event", message=f"training ends here: {why}", ended=True)
