"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.mesh import Mesh, mesh_shape
from hvdlm.comm.rank_errors import on_all_ranks
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.data.loader import Batch, Loader
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import document_ids
from hvdlm.strategies import make_strategy
from hvdlm.strategies.optimizer import clip_factor, make_optimizer
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.strategy import Report, UnreadableBatchError
from hvdlm.targets import IGNORE
from hvdlm.timing import StepTimer
from hvdlm.training.balance import Balance
from hvdlm.training.due import Due, recurs
from hvdlm.training.elastic import Elastic
from hvdlm.training.end_of_training import EndOfTraining
from hvdlm.training.hardware import seconds_alive
from hvdlm.training.metrics import FIRST_STEP, MetricsLog
from hvdlm.training.micro_batches import MicroBatch, divide
from hvdlm.training.model import make_model
from hvdlm.training.moving_average import MovingAverage
from hvdlm.training.passes import Passes
from hvdlm.training.pipeline import PipelinePasses
from hvdlm.training.precision import LossScale
from hvdlm.training.preemption import Preemption
from hvdlm.training.private_training import PrivatePasses, PrivateTraining
from hvdlm.training.replica_check import ReplicaCheck
from hvdlm.training.saver import Saver
from hvdlm.training.schedule import learning_rate
from hvdlm.training.skipped_steps import SkippedSteps
from hvdlm.training.stage_speeds import with_stages_by_speed
from hvdlm.training.step_log import StepLog
from hvdlm.training.step_metrics import StepMetrics
from hvdlm.training.task_evaluation import TaskScores
from hvdlm.training.validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on the ranks of a communicator; every rank runs the same steps on its part of each batch."""

    def __init__(
        self,
        config: Config,
        communicator: Communicator,
        data: DataSet,
        vocab_size: int,
        device: torch.device,
        servers: ServerGroup | None = None,
    ) -> None:
        """`servers`: where other processes than the ranks of `communicator` are parameter servers, or this one is."""
        shape = on_all_ranks(communicator, lambda: mesh_shape(config.parallel, communicator.size))
        self.mesh = Mesh(communicator, shape)
        self.sentences: list[str] = []  # of what was decided here, for who begins the run
        if config.train.balance and config.parallel.pipeline > 1:
            config, sentence = with_stages_by_speed(config, vocab_size, self.mesh, device)
            self.sentences.append(sentence)
        self.config, self.communicator, self.data, self.device = config, communicator, data, device
        # Who read parts of a batch of their own: ranks that share a model read the same
        self.readers = self.mesh.group("data", "shard") if config.parallel.is_used else communicator
        self.model = make_model(config, vocab_size, device, self.mesh)
        steps_locally = servers is not None and not servers.is_server and bool(config.local_steps.every)
        steps_here = steps_locally or (not config.parallel.shard and servers is None)
        self.optimizer = make_optimizer(self.model, config.optimizer) if steps_here else None
        self.strategy = make_strategy(self.model, self.optimizer, self.mesh, config, device, servers=servers)
        self.pipeline = PipelinePasses(self, self.mesh) if config.parallel.pipeline > 1 else None
        self.loss_scale = LossScale(config.train.precision)
        self.step = 0  # optimizer steps done, and so the number of the next global batch
        self.saver = Saver(self)
        self.metrics: MetricsLog | None = None  # rank 0 has one
        flops = flops_per_token(config.model, vocab_size)
        self.step_metrics = StepMetrics(communicator, device, config.train.precision, flops)
        self.timer = StepTimer(device)  # of the last step
        self.batch_sizes = config.train.batch_sizes
        self.ending, self.ema, self.validation = EndOfTraining(self), MovingAverage(self), Validation(self)
        self.tokenizer = b""  # where checkpoints may be written, the content of the data set's tokenizer.json
        self.skipped, self.task_scores = SkippedSteps(self), TaskScores(self)
        self._step_log, self._replica_check = StepLog(self), ReplicaCheck(self)
        self.unread = 0  # sequences that were left out because they could not be read
        # Of the step under way, or the last one
        self._losses: list[Tensor] = []  # of this rank's micro-batches, sums over tokens
        self._own_tokens = self._tokens = 0  # of this rank, of all
        self._sequences = 0  # of this rank
        self._rate, self.norm = 0.0, torch.tensor(math.nan)
        self._ranks_have_met = True
        self._is_ending = False  # whether messages of the step's end are under way
        self._has_done_what_was_due = False  # something that all ranks did together, since they were last even
        self.due, self._has_done_a_step = Due(), False
        self.stop = False  # whether some rank was asked to stop: training ends after this step
        self.open_metrics: Callable[[int], MetricsLog] | None = None  # for a rank that becomes rank 0
        self.privacy = PrivateTraining(self) if config.privacy.is_used else None
        self._passes = PrivatePasses(self, self.privacy) if self.privacy else Passes(self)
        self.parts = RankParts(self.privacy.batches if self.privacy else self.batch_sizes, self.readers.size)
        can_change = communicator.size > 1 or communicator.supports("join")
        self.elastic = Elastic(self) if config.comm.elastic and can_change else None
        has_shares = config.train.balance and config.parallel.pipeline == 1
        self.balance = Balance(self) if has_shares and can_change else None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are validated and saved, by name; equal on all ranks."""
        return self.strategy.parameters()

    @property
    def nominal_tokens(self) -> int:
        """Targets of the global batch under way, if every one counts."""
        return self.batch_sizes.size(self.step) * self.config.model.context_length

    @property
    def tokens_done(self) -> int:
        """Tokens of the global batches of all steps done."""
        return self.config.tokens_before(self.step)

    def start(self, weights: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Begins a run, with the model of rank 0 on all ranks, or with `weights` of the whole model, by name, that are
        equal on all. Collective.
        """
        self.strategy.start(None if weights is None else self.model.own_values(weights))
        self.ema.reset()

    def optimizer_state(self) -> dict[str, Tensor]:
        """What is saved beside the parameters, by name; equal on all ranks."""
        return {**self.strategy.optimizer_state(), **self.ema.state()}

    def train(self, loader: Loader, preemption: Preemption) -> bool:
        """Runs to the last step and returns True, or False if a signal to any rank asks to stop before.

        Raises JobError, with all steps that were done saved, if data cannot be read.

        What has been trained is saved before it is validated: a job that is killed meanwhile has lost nothing, and
        validates when it goes on.
        """
        if self.communicator.rank == 0 or self.elastic:
            # Now: whoever moves the data set while a job runs does not keep it from saving
            self.tokenizer = self.data.tokenizer_path.read_bytes()
        self.ending.begin()
        self.due.validation = self.validation.was_cut_off(self.step)
        try:
            while True:
                try:
                    if self._is_ending:
                        self._end_step()
                    self._do_what_is_due(preemption)
                    if self.step >= self.ending.last_step or self.stop:
                        break
                    if self.balance:
                        loader = self.balance.deal_out(loader)
                    if self.elastic and self.elastic.is_regroup_due:
                        loader = self.elastic.regroup(loader)
                    else:
                        self.train_step(loader, preemption.requested)
                except UnreadableBatchError as error:
                    raise JobError(f"{error}{self.saver.save_what_is_done()}") from None
                except DeadRankError as error:
                    if self.elastic is None:
                        raise
                    loader = self.elastic.recover(error, loader)
        finally:
            self.communicator.activity.idle()
            loader.close()
        self.ending.tell()
        return self.step >= self.ending.last_step and not self.stop  # more, if it goes on with fewer than are done

    def _do_what_is_due(self, preemption: Preemption) -> None:
        """What follows a step, or followed one that a rank has died after."""
        if self.due.end:  # here, or on a rank that has died since
            self.ending.end(self.due.end)
        self._report_step()
        self.saver.tell()
        if self.due.first_step:
            self.write("event", message=f"{FIRST_STEP}, {seconds_alive():.1f} s after the process began")
            self.due.first_step = False
        if self.due.save:
            if self.step == self.ending.last_step:
                self._count_unread(self.strategy.finish())
            self.saver.save(in_background=not (self.stop or self.step == self.ending.last_step))
            self.due.save, self._has_done_what_was_due = False, True
        if self.due.validation:
            self.stop |= not (self.validation.run(preemption) and self.task_scores.score(preemption))
            if not self.stop:
                self.ending.end_if_not_better(steps_later=int(self.strategy.is_local))
            self.due.validation, self._has_done_what_was_due = False, True
            self._report_step()
            if self.stop or self.step >= self.ending.last_step:
                self.saver.save_what_is_done()
            if not self.stop:
                self.saver.tell_validated()
        if self.elastic and self.strategy.is_local and self._has_done_what_was_due:
            self._has_done_what_was_due = False  # on every rank that comes here, though not every one may leave
            self.communicator.barrier()

    def train_step(self, loader: Loader, stop_here: bool) -> bool:
        """One global batch; returns whether some rank asks to stop after it."""
        timer = self.timer = StepTimer(self.device)
        activity, step = self.communicator.activity, self.step + 1
        activity.begin(f"reads the batch of step {step}")
        batch, error = self._next_batch(loader)
        if not self.strategy.takes_part():
            batch = Batch.empty(self.step, self.config.model.context_length)
        timer.end_phase("data")

        counts = self.mesh.is_first("tensor") and (self.pipeline is None or self.pipeline.counts_tokens)
        self._own_tokens = int((batch.targets != IGNORE).sum()) if counts else 0
        self._sequences = len(batch.inputs)
        asks, ends, unread = self.saver.is_due_by_time(), self.ending.asks(), len(batch.errors) if counts else 0
        error = error or self.skipped.error
        pace = self.balance.pace() if self.balance else None
        told = self.privacy.told_tokens if self.privacy else self._own_tokens
        status = self.strategy.begin_step(Report(told, stop_here, asks, unread, error, ends, pace))
        if self.elastic:
            self.elastic.begin_step()
        # The loss is a sum over tokens: it is divided by their nominal number, to keep gradients in range
        factor = self.loss_scale.factor / self.nominal_tokens
        micro_batches = self._micro_batches(batch)
        if self.pipeline:
            tokens = self.wait_for(status)  # before a rank waits for another that could not read
            losses = self.pipeline.train(micro_batches, factor)
        else:
            losses, tokens = self._passes.train(micro_batches, factor, status)
        activity.begin_wait(f"the gradients of step {step}")
        self.strategy.wait()
        if self.pipeline:
            self.pipeline.complete_gradients()
        timer.end_phase("wait")
        activity.begin_wait(f"the other ranks at the end of step {step}")
        self._losses, self._tokens = losses if counts else [], tokens
        norm = self.elastic.norm() if self.elastic else self.strategy.norm()
        timer.end_phase("wait")
        self.complete_step(norm * self._unscale() if tokens else torch.tensor(math.nan))
        self._report_step()
        return self.stop

    def complete_step(self, norm: Tensor) -> None:
        """Applies the gradients, which all have arrived, and ends the step. `norm`: of those of the mean loss."""
        self.saver.have_copied()
        unscale = self._unscale() if self._tokens else 1.0  # `skips` may change the scale of the loss
        self.norm, self._rate = norm, learning_rate(self.step, self.ending.last_step, self.config.optimizer)
        if self._tokens and not self.skipped.skips(norm):
            self._scale_and_clip(unscale, norm)
            self._update(self._rate)
        self.timer.end_phase("optimizer")
        self.step += 1
        self._is_ending = True
        self._end_step()

    def _end_step(self) -> None:
        """Ends the step, or goes on with that after a rank has died."""
        end = self.strategy.end_step()
        self._is_ending = False
        self.timer.end_phase("wait")
        if end.event is not None:
            self.write("event", message=end.event)
        self._count_unread(end.unread)
        seconds = time.perf_counter() - self.timer.begin
        if self.balance:
            self.balance.add(self.timer, self._sequences, end.paces)
        self.step_metrics.add(seconds, self.timer, self.strategy.traffic, self._losses, self._own_tokens)
        self._ranks_have_met = end.ranks_have_met
        self.stop |= end.stop
        if end.end:
            self.ending.end_by_time()
        train, is_last = self.config.train, self.step == self.ending.last_step
        self.due.first_step |= not self._has_done_a_step
        self._has_done_a_step = True
        self.due.log |= is_last or recurs(self.step, self.config.log.every)
        self.due.check |= recurs(self.step, train.check_replicas_every)
        self.due.validation |= self.validation.follows(self.step) and not end.stop
        self.due.save |= is_last or end.stop or end.save or self.saver.is_due_by_step()
        self.due.save |= self.due.validation and self.config.checkpoint.keep_best
        if self.elastic:
            self.elastic.add_due()

    def _report_step(self) -> None:
        """Writes a line of metrics and compares replicas, if that is due and the ranks have met."""
        if self.due.log and (self._ranks_have_met or self.step == self.ending.last_step):
            self.strategy.synchronize()
            self._step_log.write(self._rate)
            self.due.log, self._has_done_what_was_due = False, True
        if self.due.check and self._ranks_have_met:
            self._replica_check.compare()
            self.due.check, self._has_done_what_was_due = False, True

    def _count_unread(self, sequences: int) -> None:
        if sequences:
            self.unread += sequences
            self.write("event", message=f"{sequences} sequences cannot be read and are left out, {self.unread} so far")

    def _next_batch(self, loader: Loader) -> tuple[Batch, str | None]:
        """This rank's part of the next global batch; or an empty one and why it cannot be read."""
        try:
            batch = loader.next()
        except HvdlmError as error:
            return Batch.empty(self.step, self.config.model.context_length), str(error)
        for said in dict.fromkeys(batch.errors):
            logger.warning("rank %d leaves out a sequence: %s", self.communicator.rank, said)
        return batch, None

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """None if this rank has no sequences, unless all are to make as many passes."""
        size = self.config.train.micro_batch_size
        most = -(-self.parts.most(self.step) // size) if self.strategy.passes_are_collective else 0
        return divide(batch, size, self.device, most)

    def wait_for(self, status: Work[int]) -> int:
        """The tokens over whose mean loss gradients are; raises UnreadableBatchError on all ranks if some could not."""
        self.communicator.activity.begin_wait(f"the other ranks in step {self.step + 1}")
        tokens = status.wait()
        self.communicator.activity.begin(f"computes the gradients of step {self.step + 1}")
        self.timer.end_phase("wait")  # on a GPU, zero while it is busy with what the host has queued
        return tokens

    def micro_batch_loss(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        """Sum of the loss over the tokens of a micro-batch, in nats; its backward pass begins with `factor`."""
        documents = document_ids(inputs, self.data.eos_id) if self.config.model.document_mask else None
        return self.loss(self.model(inputs, documents), targets, factor)

    def loss(self, hidden: Tensor, targets: Tensor, factor: float) -> Tensor:
        """The same, of hidden states, (b, T, D)."""
        # A power of two, so that gradients in bf16 and fp32, which need no loss scale, are what they are without
        grad_scale = 2.0 ** math.floor(math.log2(factor)) if self.loss_scale.is_dynamic else 1.0
        return self.model.token_loss(hidden, targets, grad_scale)

    def _unscale(self) -> float:
        """By what the summed gradients are multiplied to be those of the mean loss."""
        return self.nominal_tokens / (self._tokens * self.loss_scale.factor)

    def _scale_and_clip(self, unscale: float, norm: Tensor) -> None:
        """Makes the summed gradients those of the mean loss, whose norm is `norm`, and clips their global norm."""
        clip_norm = self.config.optimizer.clip_norm
        if norm.is_cuda:  # the host does not wait for the norm
            self.strategy.scale_(unscale * (clip_norm / norm).clamp(max=1.0) if clip_norm else unscale)
            return
        factor = unscale * clip_factor(float(norm), clip_norm)
        if factor != 1.0:
            self.strategy.scale_(factor)

    def _update(self, rate: float) -> None:
        """The optimizer step, with learning rate `rate`."""
        self.strategy.apply(rate)
        self.ema.update()

    def own_loss(self) -> tuple[float, int]:
        """This rank's sum of the loss over its tokens in the last step, nats, and their number."""
        return sum(map(float, self._losses)), self._own_tokens

    def open_loader(self) -> Loader:
        """Reads this rank's batches from the next one on."""
        return Loader(
            self.data,
            self.config.model.context_length,
            self.parts,
            self.privacy.seed if self.privacy else self.config.train.seed,
            self.elastic.number if self.elastic else self.readers.rank,
            self.config.data.read_ahead,
            start=self.step,
            pin_memory=self.device.type == "cuda",
            skip_unreadable=self.config.data.on_corrupt == "skip",
            token_dropout=self.config.data.token_dropout,
        )

    def write(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, self.step, **values)
