"""What is due where workers that do not wait for one another have done all that was handed out, and nothing beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.training.preemption import Preemption

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def do_what_is_due(trainer: Trainer, is_end: bool, preemption: Preemption) -> None:
    """Saves and validates after the trainer's step. `is_end`: whether training ends here. Collective.

    What has been trained is saved before it is validated.
    """
    step = trainer.step
    stops = is_end and step < trainer.ending.last_step
    if is_end:
        trainer.saver.save_what_is_done()
    elif trainer.saver.step != step:
        trainer.saver.save(in_background=True)
    if trainer.validation.follows(step) and not stops and trainer.validation.run(preemption):
        trainer.saver.tell_validated()
    trainer.saver.have_copied()
