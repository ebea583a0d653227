"""Training of workers that do not wait for one another: each trains on what the first server hands out.

They meet at boundaries alone, where a checkpoint or a validation is due: all has been trained until there, nothing
beyond, and is saved. A worker that has died is left out there; until then the others do not even notice.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.mailbox import Letter
from hvdlm.strategies.server.group import Kind
from hvdlm.strategies.server.ordering import LINE
from hvdlm.strategies.server.strategy import ServedWorker
from hvdlm.training.boundary import do_what_is_due
from hvdlm.training.preemption import Preemption
from hvdlm.training.served_steps import write_step
from hvdlm.training.share_training import ShareTraining

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

logger = logging.getLogger(__name__)


class AsynchronousTraining:
    """In place of `Trainer.train`, with the same model, checkpoints and validation."""

    def __init__(self, trainer: Trainer) -> None:
        """Collective. Raises JobError on all ranks if the data set is too small."""
        assert isinstance(trainer.strategy, ServedWorker)
        self._trainer, self._strategy = trainer, trainer.strategy
        # As many of a batch also when fewer workers are left
        self._shares = ShareTraining(trainer, trainer.config.server.shares or trainer.communicator.size)

    def train(self, preemption: Preemption) -> bool:
        """Returns whether training has come to its last step; False if a signal has asked to stop before."""
        trainer, activity = self._trainer, self._trainer.communicator.activity
        trainer.tokenizer = trainer.data.tokenizer_path.read_bytes()  # any worker may have to write checkpoints
        trainer.ending.begin()
        done, is_over = None, trainer.step >= trainer.ending.last_step
        while not is_over:
            activity.begin_wait("a task")
            answer = self._strategy.ask(done, preemption.requested)
            if answer.kind == Kind.TASK:
                self._log(answer.data)
                done = self._shares.push(answer)
            else:
                done = None
                is_over = self._meet(answer, preemption)
        activity.idle()
        trainer.ending.tell()
        return trainer.step >= trainer.ending.last_step

    def _meet(self, boundary: Letter, preemption: Preemption) -> bool:
        """What is due after a step, by all workers that live; returns whether training is over."""
        trainer = self._trainer
        _, step, is_end, workers = boundary.header
        trainer.step = step
        self._strategy.meet(step)
        must_regroup = workers < trainer.communicator.size
        while True:
            try:
                if must_regroup:
                    self._leave_out_the_dead()
                self._log(boundary.data)
                do_what_is_due(trainer, bool(is_end), preemption)
                trainer.communicator.barrier()
                return bool(is_end)
            except DeadRankError as error:
                logger.debug("at a boundary: %s", error)
                must_regroup = True

    def _leave_out_the_dead(self) -> None:
        trainer = self._trainer
        before = trainer.communicator.size
        trainer.communicator.regroup_()
        trainer.step_metrics.ranks_have_changed()
        if trainer.saver.recover():
            trainer.saver.step = 0
        self._take_over_log()
        left = trainer.communicator.size
        trainer.write("event", message=f"{before - left} workers have died: {left} go on from step {trainer.step}")

    def _take_over_log(self) -> None:
        trainer = self._trainer
        if trainer.communicator.rank == 0 and trainer.metrics is None and trainer.open_metrics is not None:
            trainer.metrics = trainer.open_metrics(trainer.step)

    def _log(self, data: Tensor) -> None:
        """Writes lines about steps, which the first server has sent to the first worker that lives."""
        for row in data.view(torch.float64).view(-1, len(LINE)).tolist() if len(data) else ():
            write_step(self._trainer, dict(zip(LINE, row, strict=True)), self._strategy.traffic.wire_bytes)
