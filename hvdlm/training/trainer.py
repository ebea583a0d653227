"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, ReduceOp, Work
from hvdlm.config import Config
from hvdlm.data.loader import Batch, Loader
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.gradients.sync import GradientSync
from hvdlm.model.loss import token_loss
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import document_ids
from hvdlm.targets import IGNORE
from hvdlm.timing import StepTimer
from hvdlm.training import checkpoint
from hvdlm.training.evaluation import evaluate
from hvdlm.training.hardware import seconds_alive
from hvdlm.training.late_number import LateNumber
from hvdlm.training.metrics import MetricsLog
from hvdlm.training.model import make_model
from hvdlm.training.optimizer import make_optimizer, optimizer_tensors, set_learning_rate
from hvdlm.training.precision import LossScale
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_errors import on_rank_0, raise_on_all_ranks
from hvdlm.training.rank_states import gather_to_files, scatter_from_checkpoint
from hvdlm.training.replicas import broadcast_tensors, check_replicas
from hvdlm.training.schedule import learning_rate
from hvdlm.training.step_metrics import StepMetrics


class Totals(NamedTuple):
    """Sums over all ranks for one step."""

    tokens: int  # targets that count
    stop: bool  # whether some rank asks to stop after this step


class UnreadableBatchError(JobError):
    """Some rank cannot read its part of the next batch: weights are those of the step before."""


class Trainer:
    """Trains one model on the ranks of a communicator; every rank runs the same steps on its part of each batch."""

    def __init__(
        self, config: Config, communicator: Communicator, data: DataSet, vocab_size: int, device: torch.device
    ) -> None:
        self.config, self.communicator, self.data, self.device = config, communicator, data, device
        self.model = make_model(config, vocab_size, device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.optimizer_state = optimizer_tensors(self.optimizer, self.model)
        self.sync = GradientSync(self.model, communicator, config.comm, config.compression)
        self.loss_scale = LossScale(config.train.precision)
        self.sync.only_if_finite = self.loss_scale.is_dynamic and bool(self.sync.codec_state())
        self.step = 0  # optimizer steps done, and so the number of the next global batch
        self._saved_step = 0  # the last one of which there is a checkpoint
        self.metrics: MetricsLog | None = None  # rank 0 has one
        flops = flops_per_token(config.model, vocab_size)
        self.step_metrics = StepMetrics(communicator, device, config.train.precision, flops)
        self.timer = StepTimer(device)  # of the last step
        # Tokens of a global batch in which every target counts
        self.nominal_tokens = config.train.global_batch_size * config.model.context_length
        self._tokenizer = b""  # on rank 0, which saves, the content of the data set's tokenizer.json
        self._unchecked_norm: tuple[int, LateNumber] | None = None  # of the step before, on a GPU

    def restore(self, source: checkpoint.Checkpoint | None, state: dict[str, Any]) -> None:
        """Restores a checkpoint, which rank 0 has open as `source`; all ranks have its `state`. Collective.

        Raises JobError if its weights are of no use.
        """
        tensors = {**self.parameters, **self.optimizer_state}

        def read() -> None:
            assert source is not None
            with torch.no_grad():
                for name, tensor in {**source.model(), **source.optimizer()}.items():
                    tensors[name].copy_(tensor)

        on_rank_0(self.communicator, read)
        broadcast_tensors(self.communicator, self.optimizer_state.values())
        self.sync.load_state_dict(state["gradients"])
        scatter_from_checkpoint(self.communicator, source, self.sync.codec_state(), state["world_size"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.sync.restore_residuals_(self.loss_scale.factor / state["loss_scale"]["factor"])  # precision may differ
        self.step = self._saved_step = state["step"]

    def train(self, loader: Loader, preemption: Preemption) -> bool:
        """Runs to the last step and returns True, or False if a signal to any rank asks to stop before.

        Raises JobError, with all steps that were done saved, if data cannot be read.

        What has been trained is saved before it is validated: a job that is killed meanwhile has lost nothing, and
        validates when it goes on.
        """
        train, save_every = self.config.train, self.config.checkpoint.every
        if self.communicator.rank == 0:  # now: whoever moves the data set while a job runs does not keep it from saving
            self._tokenizer = self.data.tokenizer_path.read_bytes()
        broadcast_tensors(self.communicator, self.parameters.values())
        self.model.update_low_precision_weights()
        first, stop = self.step + 1, False
        if self._was_killed_in_validation():
            stop = not self._validate(preemption)
        while self.step < train.steps and not stop:
            try:
                stop = self.train_step(loader, preemption.requested)
            except UnreadableBatchError as error:
                raise JobError(f"{error}{self._save_what_is_done(loader)}") from None
            if self.step == first:
                self._write("event", message=f"first step done, {seconds_alive():.1f} s after the process began")
            if _is_due(self.step, train.check_replicas_every):
                check_replicas(self.communicator, self.parameters, self.step)
            if self.step == train.steps or stop or _is_due(self.step, save_every):
                self._save(loader)
            if self._validates() and not stop:
                stop = not self._validate(preemption)
                if stop and self._saved_step != self.step:
                    self._save(loader)
        return self.step >= train.steps and not stop  # more, if it goes on with fewer steps than are done

    def _validates(self) -> bool:
        """Whether a validation follows the step that was done last."""
        train = self.config.train
        return self.step == train.steps or _is_due(self.step, train.evaluate_every)

    def _was_killed_in_validation(self) -> bool:
        """Whether the checkpoint to go on from was saved, and its validation then not ended. Collective."""
        if self.step == 0 or not self._validates():
            return False
        return self.communicator.broadcast_object(self.metrics is not None and not self.metrics.is_validated(self.step))

    def train_step(self, loader: Loader, stop_here: bool) -> bool:
        """One global batch; returns whether some rank asks to stop after it."""
        timer = self.timer = StepTimer(self.device)
        batch, error = self._next_batch(loader)
        timer.end_phase("data")

        totals: Totals | None = None
        reduction = self._reduce_totals_async(batch, stop_here, error)
        self._seed_dropout()
        self.sync.zero_grad()
        losses = []
        micro_batches = self._micro_batches(batch)
        # The loss is a sum over tokens: it is divided by their nominal number, to keep gradients in range
        factor = self.loss_scale.factor / self.nominal_tokens
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            loss = self._forward(inputs, targets, factor)
            losses.append(loss.detach())
            timer.end_phase("forward")
            if number == len(micro_batches):
                totals = self._wait_for_totals(reduction, error)
                self.sync.set_last_micro_batch()  # gradients are final from here on: buckets are reduced when ready
            (loss * factor).backward()
            timer.end_phase("backward")
        if totals is None:  # this rank has no sequences, and contributes zeros
            totals = self._wait_for_totals(reduction, error)
            self.sync.set_last_micro_batch()
        self.sync.wait()
        timer.end_phase("wait")

        rate = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        unscale = self.nominal_tokens / (totals.tokens * self.loss_scale.factor)  # to the mean over all tokens
        norm = self._norm(unscale)
        if not self._skip_step(norm):
            self._scale_and_clip(unscale, norm)
            self._update(rate)
        timer.end_phase("optimizer")
        self.step += 1
        self.step_metrics.add(time.perf_counter() - timer.begin, timer, self.sync.traffic.codec_seconds)
        if _is_due(self.step, self.config.log.every) or self.step == self.config.train.steps:
            self.sync.synchronize()
            self._log(sum(map(float, losses)), totals.tokens, rate, float(norm))
        return totals.stop

    def _next_batch(self, loader: Loader) -> tuple[Batch, str | None]:
        """This rank's part of the next global batch; or an empty one and why it cannot be read."""
        try:
            return loader.next(), None
        except HvdlmError as error:
            empty = torch.empty((0, self.config.model.context_length), dtype=torch.int64)
            return Batch(self.step, empty, empty), str(error)

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, (b, T) each, of at most `micro_batch_size` sequences; empty if this rank has none."""
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.inputs, batch.targets))
        size = self.config.train.micro_batch_size
        if not len(inputs):
            return []
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def _reduce_totals_async(self, batch: Batch, stop_here: bool, error: str | None) -> Work[Tensor]:
        """Starts the sum over all ranks of tokens, requests to stop and errors, while the first passes run."""
        tokens = int((batch.targets != IGNORE).sum())
        counts = torch.tensor([tokens, int(stop_here), int(error is not None)])
        return self.communicator.all_reduce_async_(counts, ReduceOp.SUM)

    def _wait_for_totals(self, reduction: Work[Tensor], error: str | None) -> Totals:
        """The totals of all ranks. Raises UnreadableBatchError on all ranks if some rank could not."""
        tokens, stops, errors = reduction.wait().tolist()
        if errors:
            try:
                raise_on_all_ranks(self.communicator, self.communicator.all_gather_object(error))
            except JobError as failure:
                raise UnreadableBatchError(str(failure)) from None
        self.timer.end_phase("wait")  # on a GPU, zero while it is busy with what the host has queued
        return Totals(tokens, stops > 0)

    def _forward(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        """Sum of the loss over the tokens of a micro-batch, in nats; its backward pass begins with `factor`."""
        documents = document_ids(inputs, self.data.eos_id) if self.config.model.document_mask else None
        hidden = self.model(inputs, documents)  # (b, T, D)
        # A power of two, so that gradients in bf16 and fp32, which need no loss scale, are what they are without
        grad_scale = 2.0 ** math.floor(math.log2(factor)) if self.loss_scale.is_dynamic else 1.0
        return token_loss(hidden, self.model.output_weight, targets, self.model.dtype, grad_scale=grad_scale)

    def _norm(self, unscale: float) -> Tensor:
        """Global norm of the gradients of the mean loss, a scalar on their device, equal on all ranks."""
        return self.sync.norm() * unscale

    def _skip_step(self, norm: Tensor) -> bool:
        """Whether fp16 gradients overflowed, so that this step is skipped; adapts the loss scale.

        Raises JobError if the norm is not finite in another precision, or if no loss scale helps.
        """
        if not self.loss_scale.is_dynamic:
            self._check_norm(norm)
            return False
        self.sync.synchronize()
        skip = not math.isfinite(norm)
        if skip:
            self._check_overflow()
        self.sync.scale_residuals_(self.loss_scale.update(skip))
        if skip:
            factor = self.loss_scale.factor
            self._write("event", message=f"fp16 gradients overflowed: step skipped, loss scale now {factor:g}")
        return skip

    def _check_norm(self, norm: Tensor) -> None:
        """Raises JobError if the gradient norm is not finite.

        On a GPU it is that of the step before, which has arrived by now: the host does not wait in the step.
        """
        checked: tuple[int, float] | None = None
        if not norm.is_cuda:
            checked = self.step + 1, float(norm)
        elif self._unchecked_norm is not None:
            step, late = self._unchecked_norm
            checked = step, late.read(self.communicator, self.config.comm.timeout)
        self._unchecked_norm = (self.step + 1, LateNumber(norm)) if norm.is_cuda else None
        if checked is not None and not math.isfinite(checked[1]):
            raise JobError(
                f"the gradient norm is {checked[1]} at step {checked[0]}: lower optimizer.lr, or resume from the last "
                "checkpoint with other settings"
            )

    def _check_overflow(self) -> None:
        """Raises JobError if gradients have overflowed for a reason that no loss scale mends. All ranks are alike."""
        step = self.step + 1
        if name := checkpoint.not_finite(self.parameters):
            raise JobError(
                f"{name} holds NaN or infinite numbers at step {step}: lower optimizer.lr or lengthen "
                "optimizer.warmup_steps, and resume from the last checkpoint"
            )
        if self.loss_scale.is_least:
            raise JobError(
                f"fp16 gradients overflow at step {step} even with the least loss scale, {self.loss_scale.factor:g}: "
                "set train.precision to bf16, or lower optimizer.lr"
            )

    def _scale_and_clip(self, unscale: float, norm: Tensor) -> None:
        """Makes the summed gradients those of the mean loss, whose norm is `norm`, and clips their global norm."""
        clip_norm = self.config.optimizer.clip_norm
        if norm.is_cuda:  # the host does not wait for the norm
            self.sync.scale_(unscale * (clip_norm / norm).clamp(max=1.0) if clip_norm else unscale)
            return
        length = float(norm)
        factor = unscale * (clip_norm / length if 0 < clip_norm < length else 1.0)
        if factor != 1.0:
            self.sync.scale_(factor)

    def _update(self, rate: float) -> None:
        """The optimizer step, with learning rate `rate`."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.model.update_low_precision_weights()

    def _log(self, loss_sum: float, tokens: int, rate: float, norm: float) -> None:
        numbers = self.step_metrics.collect(loss_sum, tokens, self.sync.traffic)
        self._write("train", lr=rate, grad_norm=norm, tokens=self._tokens_done(), **numbers)

    def _validate(self, preemption: Preemption) -> bool:
        """Writes the validation loss; or returns False, as soon as a signal to any rank asks to stop.

        Raises JobError if the loss is not finite.
        """
        if not self.data.validation.shards:
            self._write("event", message="no validation: the data set was prepared without it")
            return True
        sizes = self.config.train.micro_batch_size, self.config.train.evaluate_sequences
        result = evaluate(self.model, self.data, self.communicator, *sizes, lambda: preemption.requested)
        if result is not None:
            self._write("eval", loss=result.loss, accuracy=result.accuracy, tokens=self._tokens_done())
            if not math.isfinite(result.loss):
                raise JobError(
                    f"the validation loss is {result.loss} after step {self.step}: the model has diverged; lower "
                    "optimizer.lr, and resume from an earlier checkpoint"
                )
        return result is not None

    def _state(self, loader: Loader) -> dict[str, Any]:
        """The contents of a checkpoint's state.json."""
        return {
            "step": self.step,
            "data": {**loader.state_dict(), "batch": self.step},
            "loss_scale": self.loss_scale.state_dict(),
            "gradients": self.sync.state_dict(),
            "config": self.config.model_dump(),
            "vocab_size": self.model.vocab_size,
            "world_size": self.communicator.size,
            "fingerprint": self.data.fingerprint,
            "versions": checkpoint.versions(),
        }

    def _save(self, loader: Loader) -> None:
        """Raises JobError, and leaves the checkpoints as they are, if the weights are of no use."""
        if name := checkpoint.not_finite(self.parameters):
            raise JobError(
                f"{name} holds NaN or infinite numbers after step {self.step}, which is not saved: lower optimizer.lr, "
                "and resume from the last checkpoint"
            )
        parent, keep = checkpoint.directory(self.config.train.run_dir), self.config.checkpoint.keep
        ranks = gather_to_files(self.communicator, self.sync.codec_state(), parent)

        def write() -> Path:
            tensors = self.parameters, self.optimizer_state
            return checkpoint.save(parent, self.step, *tensors, self._state(loader), self._tokenizer, keep, ranks)

        self._write("event", message=f"saved {on_rank_0(self.communicator, write)}")
        self._saved_step = self.step

    def _save_what_is_done(self, loader: Loader) -> str:
        """Saves the last step, unless it is saved; returns what an error message says of it."""
        if self._saved_step == self.step:
            return ""
        self._save(loader)
        return f"; step {self.step} was saved: go on with --resume latest"

    def open_loader(self) -> Loader:
        """Reads this rank's batches from the next one on."""
        train, communicator = self.config.train, self.communicator
        length, pin = self.config.model.context_length, self.device.type == "cuda"
        share = (communicator.rank, communicator.size)
        ahead = self.config.data.read_ahead
        return Loader(
            self.data, length, train.global_batch_size, train.seed, *share, ahead, start=self.step, pin_memory=pin
        )

    def _write(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, self.step, **values)

    def _tokens_done(self) -> int:
        return self.step * self.nominal_tokens

    def _seed_dropout(self) -> None:
        """By seed, step and rank: resuming needs no random-number state."""
        seed = (self.config.train.seed * 1_000_003 + self.step) * 1_000_003 + self.communicator.rank
        torch.manual_seed(seed % 2**63)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
