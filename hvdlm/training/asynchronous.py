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
from hvdlm.comm.rank_errors import on_all_ranks
from hvdlm.data.loader import SequenceReader
from hvdlm.data.sampler import rank_part
from hvdlm.strategies.server.group import Kind
from hvdlm.strategies.server.ordering import LINE
from hvdlm.strategies.server.strategy import Done, ServedWorker
from hvdlm.targets import IGNORE
from hvdlm.training.due import recurs
from hvdlm.training.hardware import peak_memory_bytes
from hvdlm.training.micro_batches import divide
from hvdlm.training.model import seed_dropout
from hvdlm.training.preemption import Preemption

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

logger = logging.getLogger(__name__)


class AsynchronousTraining:
    """In place of `Trainer.train`, with the same model, checkpoints and validation."""

    def __init__(self, trainer: Trainer) -> None:
        """Collective. Raises JobError on all ranks if the data set is too small."""
        assert isinstance(trainer.strategy, ServedWorker)
        self._trainer, self._strategy = trainer, trainer.strategy
        self._shares = trainer.communicator.size  # of a batch, also when fewer workers are left
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
                done = self._train_on(answer)
            else:
                done = None
                is_over = self._meet(answer, preemption)
        activity.idle()
        trainer.ending.tell()
        return trainer.step >= trainer.ending.last_step

    def _train_on(self, order: Letter) -> Done:
        """Pushes the gradients of a task."""
        trainer, strategy, activity = self._trainer, self._strategy, self._trainer.communicator.activity
        _, task, version, _ = order.header
        number, share = divmod(task, self._shares)
        activity.begin(f"computes a share of batch {number}")
        sizes, config = trainer.batch_sizes, trainer.config
        own = [(number, place) for place in rank_part(sizes.size(number), share, self._shares)]
        batch = self._reader.read(number, own)
        strategy.begin_task(task)
        seed_dropout(config.train.seed, number, share)
        factor = 1 / (sizes.size(number) * config.model.context_length)
        micro_batches, losses = divide(batch, config.train.micro_batch_size, trainer.device), list[Tensor]()
        for count, (inputs, targets) in enumerate(micro_batches, start=1):
            loss = trainer.micro_batch_loss(inputs, targets, factor)
            losses.append(loss.detach())
            if count == len(micro_batches):
                strategy.set_last_micro_batch()
            (loss * factor).backward()
        strategy.end_task()
        return Done(task, version, sum(map(float, losses)), int((batch.targets != IGNORE).sum()))

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
                stops = bool(is_end) and step < trainer.ending.last_step
                if trainer.saver.step != step:  # what has been trained is saved before it is validated
                    trainer.saver.save(in_background=not is_end)
                if trainer.validation.follows(step) and not stops:
                    trainer.validation.run(preemption)
                trainer.saver.have_copied()
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
        trainer, metrics = self._trainer, self._trainer.metrics
        if metrics is None or not len(data):
            return
        for row in data.view(torch.float64).view(-1, len(LINE)).tolist():
            line = dict(zip(LINE, row, strict=True))
            step, seconds, tokens = int(line.pop("step")), line.pop("seconds"), line.pop("tokens")
            loss = line.pop("loss") / tokens if tokens else float("nan")
            if step != trainer.ending.last_step and not recurs(step, trainer.config.log.every):
                continue
            traffic = self._strategy.traffic
            metrics.write(
                "train",
                step,
                lr=line.pop("lr"),
                grad_norm=line.pop("grad_norm"),
                tokens=trainer.config.tokens_before(step),
                loss=loss,
                mean_loss=loss,
                tokens_per_second=tokens / seconds,
                step_seconds=seconds,
                exposed_comm_seconds=0.0,
                wire_bytes=traffic.wire_bytes,
                world_size=int(line.pop("workers")),
                memory_bytes=peak_memory_bytes(trainer.device),
                **line,
            )
