"""Steps whose gradients are not finite: the model stays as it is, and too many of them in a row end the job.

The norm of the gradients tells of them. It is equal on all ranks whose gradients are, so these leave out a step
together and without a message. Where ranks step by gradients of their own, one leaves out its own step, and tells the
others when it gives up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hvdlm.errors import JobError
from hvdlm.training.checkpoint_contents import not_finite
from hvdlm.training.late_number import LateNumber

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

logger = logging.getLogger(__name__)

_REMEDY = "lower optimizer.lr or lengthen optimizer.warmup_steps, and resume from the last checkpoint"


class SkippedSteps:
    """Decides for a trainer which steps are left out."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.in_a_row = 0  # equal on all ranks that step together
        self._late: tuple[int, LateNumber] | None = None  # of the step before, on a GPU
        self.error: str | None = None  # why this rank gives up, where it must tell the others

    def skips(self, norm: Tensor) -> bool:
        """Whether the step under way, whose gradients have the `norm`, is to be left out; adapts fp16's loss scale.

        Raises JobError if too many have been left out in a row, or if the weights themselves are not finite.
        """
        trainer, scale = self._trainer, self._trainer.loss_scale
        if not scale.is_dynamic and norm.is_cuda and trainer.strategy.leave_out_if(norm.isfinite().logical_not()):
            self._read_late(norm)
            return False  # the GPU decides, and the host learns of it later
        if norm.is_cuda:
            trainer.strategy.synchronize()
        skip = not math.isfinite(norm)
        was_least = scale.is_least
        trainer.strategy.scale_residuals_(scale.update(skip))
        if not skip:
            self.in_a_row = 0
        elif scale.is_dynamic and not was_least:
            self._check_weights(trainer.step + 1)
            trainer.write("event", message=f"fp16 gradients overflowed: step skipped, loss scale now {scale.factor:g}")
        else:
            self._count(trainer.step + 1)
        return skip

    def _read_late(self, norm: Tensor) -> None:
        """Counts the step before, whose norm has arrived by now: the host does not wait for the GPU in the step."""
        late, self._late = self._late, (self._trainer.step + 1, LateNumber(norm))
        if late is None:
            return
        step, number = late
        if math.isfinite(number.read(self._trainer.communicator, self._trainer.config.comm.timeout)):
            self.in_a_row = 0
        else:
            self._count(step)

    def _count(self, step: int) -> None:
        self._check_weights(step)
        self.in_a_row += 1
        trainer = self._trainer
        name = self._find_not_finite(lambda parameter: parameter.grad)
        what = f"the gradient of {name}" if name else "a gradient"
        if self.in_a_row > trainer.config.train.max_skipped:
            steps = f", the last of {self.in_a_row} in a row" if self.in_a_row > 1 else ""
            remedy = "lower optimizer.lr, or resume from the last checkpoint with other settings"
            if trainer.loss_scale.is_dynamic:
                what += f" overflows in fp16 even with the least loss scale, {trainer.loss_scale.factor:g}"
                remedy = "set train.precision to bf16, or lower optimizer.lr"
            else:
                what += " is not finite"
            self._give_up(f"{what} at step {step}{steps} (batch {step - 1}): {remedy}")
            return
        self._say(f"step {step} is left out: {what} is not finite (batch {step - 1})")

    def _check_weights(self, step: int) -> None:
        if name := self._find_not_finite(lambda parameter: parameter):
            self._give_up(f"{name} holds NaN or infinite numbers at step {step}: {_REMEDY}")

    def _find_not_finite(self, of: Callable[[Tensor], Tensor | None]) -> str | None:
        """The name of a parameter of which `of` gives numbers that are not finite; of all ranks, if each has a part."""
        trainer = self._trainer
        is_divided = trainer.strategy.held_parts() is not None
        own = trainer.parameters if is_divided else dict(trainer.model.named_parameters())
        name = not_finite({name: tensor for name, each in own.items() if (tensor := of(each)) is not None})
        found = trainer.communicator.all_gather_object(name) if is_divided else [name]
        return next((each for each in found if each is not None), None)

    def _give_up(self, sentence: str) -> None:
        if self._trainer.strategy.ranks_are_equal:
            raise JobError(sentence)
        self.error = self.error or sentence

    def _say(self, sentence: str) -> None:
        trainer = self._trainer
        trainer.write("event", message=sentence)
        if trainer.metrics is None and not trainer.strategy.ranks_are_equal:
            logger.warning("rank %d: %s", trainer.communicator.rank, sentence)
