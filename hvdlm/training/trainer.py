"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, Work
from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.comm.replicas import broadcast_tensors, check_replicas
from hvdlm.config import Config, LocalStepsSection
from hvdlm.data.loader import Batch, Loader
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.loss import token_loss
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import document_ids
from hvdlm.strategies import make_strategy
from hvdlm.strategies.optimizer import make_optimizer
from hvdlm.strategies.strategy import RankState, UnreadableBatchError
from hvdlm.targets import IGNORE
from hvdlm.timing import StepTimer
from hvdlm.training import checkpoint
from hvdlm.training.evaluation import evaluate
from hvdlm.training.hardware import seconds_alive
from hvdlm.training.late_number import LateNumber
from hvdlm.training.metrics import MetricsLog
from hvdlm.training.model import make_model
from hvdlm.training.precision import LossScale
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_states import gather_to_files, read_equal_state, scatter_from_checkpoint
from hvdlm.training.schedule import learning_rate
from hvdlm.training.step_metrics import StepMetrics


class Trainer:
    """Trains one model on the ranks of a communicator; every rank runs the same steps on its part of each batch."""

    def __init__(
        self, config: Config, communicator: Communicator, data: DataSet, vocab_size: int, device: torch.device
    ) -> None:
        self.config, self.communicator, self.data, self.device = config, communicator, data, device
        self.model = make_model(config, vocab_size, device)
        optimizer = make_optimizer(self.model, config.optimizer)
        self.strategy = make_strategy(self.model, optimizer, communicator, config)
        self.sync = self.strategy.sync
        self.loss_scale = LossScale(config.train.precision)
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
        # What waits for a step in which the ranks meet
        self._log_is_due = self._check_is_due = False

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are validated and saved, by name; equal on all ranks."""
        return self.strategy.parameters()

    def start(self) -> None:
        """Begins a run, with the model of rank 0 on all ranks. Collective."""
        self.strategy.start()

    def restore(self, source: checkpoint.Checkpoint | None, state: dict[str, Any]) -> list[str]:
        """Restores a checkpoint, which rank 0 has open as `source`; all ranks have its `state`. Collective.

        Returns what the user is to be told. Raises JobError if its weights are of no use.
        """
        size, strategy = state["world_size"], self.strategy
        combines_alike = LocalStepsSection(**state["config"].get("local_steps", {})) == self.config.local_steps
        as_saved = combines_alike and size == self.communicator.size
        strategy.load_state_dict(state, state["step"], as_saved)
        equal = {**strategy.parameters(), **strategy.optimizer_state()}
        on_rank_0(self.communicator, lambda: read_equal_state(source, equal, size))
        broadcast_tensors(self.communicator, equal.values())
        self.loss_scale.load_state_dict(state["loss_scale"])
        own = self._rank_state()
        scatter_from_checkpoint(self.communicator, source, own, size)
        if "loss_scale" in own.dropped:
            self.loss_scale.load_tensor(own.dropped["loss_scale"])
        strategy.restored(self.loss_scale.factor / state["loss_scale"]["factor"])  # precision may differ
        self.step = self._saved_step = state["step"]
        if as_saved or state.get("ranks_are_equal", True):
            return []
        return [
            "training goes on from the parameters that were averaged last, with the mean of the moments: the number of "
            "ranks or [local_steps] was another, so what each rank has learned since is not used"
        ]

    def train(self, loader: Loader, preemption: Preemption) -> bool:
        """Runs to the last step and returns True, or False if a signal to any rank asks to stop before.

        Raises JobError, with all steps that were done saved, if data cannot be read.

        What has been trained is saved before it is validated: a job that is killed meanwhile has lost nothing, and
        validates when it goes on.
        """
        train, save_every = self.config.train, self.config.checkpoint.every
        if self.communicator.rank == 0:  # now: whoever moves the data set while a job runs does not keep it from saving
            self._tokenizer = self.data.tokenizer_path.read_bytes()
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
            if self.step == train.steps:
                self.strategy.finish()
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
        if not self.strategy.takes_part():
            batch = self._empty_batch()
        timer.end_phase("data")

        tokens: int | None = None
        own_tokens = int((batch.targets != IGNORE).sum())
        status = self.strategy.begin_step(own_tokens, stop_here, error)
        self._seed_dropout()
        losses = []
        micro_batches = self._micro_batches(batch)
        # The loss is a sum over tokens: it is divided by their nominal number, to keep gradients in range
        factor = self.loss_scale.factor / self.nominal_tokens
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            loss = self._forward(inputs, targets, factor)
            losses.append(loss.detach())
            timer.end_phase("forward")
            if number == len(micro_batches):
                tokens = self._wait_for(status)
                self.strategy.set_last_micro_batch()  # gradients are final from here on: they are sent when ready
            (loss * factor).backward()
            timer.end_phase("backward")
        if tokens is None:  # this rank has no sequences, and contributes zeros
            tokens = self._wait_for(status)
            self.strategy.set_last_micro_batch()
        self.strategy.wait()
        timer.end_phase("wait")

        rate = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        norm = torch.tensor(math.nan)
        if tokens:
            unscale = self.nominal_tokens / (tokens * self.loss_scale.factor)  # to the mean over those tokens
            norm = self._norm(unscale)
            if not self._skip_step(norm):
                self._scale_and_clip(unscale, norm)
                self._update(rate)
        timer.end_phase("optimizer")
        self.step += 1
        end = self.strategy.end_step()
        timer.end_phase("wait")
        if end.event is not None:
            self._write("event", message=end.event)
        self.step_metrics.add(time.perf_counter() - timer.begin, timer, self.strategy.traffic, own_tokens)
        is_last = self.step == self.config.train.steps
        self._log_is_due |= is_last or _is_due(self.step, self.config.log.every)
        self._check_is_due |= _is_due(self.step, self.config.train.check_replicas_every)
        if self._log_is_due and (end.ranks_have_met or is_last):
            self.sync.synchronize()
            self._log(sum(map(float, losses)), own_tokens, rate, float(norm))
            self._log_is_due = False
        if self._check_is_due and end.ranks_have_met:
            check_replicas(self.communicator, self.parameters, self.step)
            self._check_is_due = False
        return end.stop

    def _next_batch(self, loader: Loader) -> tuple[Batch, str | None]:
        """This rank's part of the next global batch; or an empty one and why it cannot be read."""
        try:
            return loader.next(), None
        except HvdlmError as error:
            return self._empty_batch(), str(error)

    def _empty_batch(self) -> Batch:
        empty = torch.empty((0, self.config.model.context_length), dtype=torch.int64)
        return Batch(self.step, empty, empty)

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, (b, T) each, of at most `micro_batch_size` sequences; empty if this rank has none."""
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.inputs, batch.targets))
        size = self.config.train.micro_batch_size
        if not len(inputs):
            return []
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def _wait_for(self, status: Work[int]) -> int:
        """The tokens over whose mean loss gradients are; raises UnreadableBatchError on all ranks if some could not."""
        tokens = status.wait()
        self.timer.end_phase("wait")  # on a GPU, zero while it is busy with what the host has queued
        return tokens

    def _forward(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        """Sum of the loss over the tokens of a micro-batch, in nats; its backward pass begins with `factor`."""
        documents = document_ids(inputs, self.data.eos_id) if self.config.model.document_mask else None
        hidden = self.model(inputs, documents)  # (b, T, D)
        # A power of two, so that gradients in bf16 and fp32, which need no loss scale, are what they are without
        grad_scale = 2.0 ** math.floor(math.log2(factor)) if self.loss_scale.is_dynamic else 1.0
        return token_loss(hidden, self.model.output_weight, targets, self.model.dtype, grad_scale=grad_scale)

    def _norm(self, unscale: float) -> Tensor:
        """Norm of the gradients of the mean loss, a scalar on their device."""
        return self.strategy.norm() * unscale

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
        self.strategy.scale_residuals_(self.loss_scale.update(skip))
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
        """Raises JobError if gradients have overflowed for a reason that no loss scale mends."""
        step = self.step + 1
        if name := checkpoint.not_finite(dict(self.model.named_parameters())):
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
            self.strategy.scale_(unscale * (clip_norm / norm).clamp(max=1.0) if clip_norm else unscale)
            return
        length = float(norm)
        factor = unscale * (clip_norm / length if 0 < clip_norm < length else 1.0)
        if factor != 1.0:
            self.strategy.scale_(factor)

    def _update(self, rate: float) -> None:
        """The optimizer step, with learning rate `rate`."""
        self.strategy.apply(rate)

    def _log(self, loss_sum: float, tokens: int, rate: float, norm: float) -> None:
        """`loss_sum`, `tokens`: this rank's. Collective."""
        numbers = {**self.step_metrics.collect(loss_sum, tokens), **self.strategy.log_numbers()}
        self._write("train", lr=rate, grad_norm=norm, tokens=self._tokens_done(), **numbers)

    def _validate(self, preemption: Preemption) -> bool:
        """Writes the validation loss; or returns False, as soon as a signal to any rank asks to stop.

        Raises JobError if the loss is not finite.
        """
        if not self.data.validation.shards:
            self._write("event", message="no validation: the data set was prepared without it")
            return True
        sizes = self.config.train.micro_batch_size, self.config.train.evaluate_sequences
        with self.strategy.evaluation_parameters():
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
            **self.strategy.state_dict(),
            "ranks_are_equal": self.strategy.ranks_are_equal,
            "config": self.config.model_dump(),
            "vocab_size": self.model.vocab_size,
            "world_size": self.communicator.size,
            "fingerprint": self.data.fingerprint,
            "versions": checkpoint.versions(),
        }

    def _save(self, loader: Loader) -> None:
        """Raises JobError, and leaves the checkpoints as they are, if the weights are of no use."""
        equal = self.parameters, self.strategy.optimizer_state()
        if name := checkpoint.not_finite(equal[0]):
            raise JobError(
                f"{name} holds NaN or infinite numbers after step {self.step}, which is not saved: lower optimizer.lr, "
                "and resume from the last checkpoint"
            )
        parent, keep = checkpoint.directory(self.config.train.run_dir), self.config.checkpoint.keep
        ranks = gather_to_files(self.communicator, self._rank_state().tensors(), parent)

        def write() -> Path:
            return checkpoint.save(parent, self.step, *equal, self._state(loader), self._tokenizer, keep, ranks)

        self._write("event", message=f"saved {on_rank_0(self.communicator, write)}")
        self._saved_step = self.step

    def _rank_state(self) -> RankState:
        """What each rank has of its own; its loss scale, too, where ranks step by gradients of their own."""
        state = self.strategy.rank_state()
        if self.loss_scale.is_dynamic and not self.strategy.ranks_are_equal:
            state.dropped["loss_scale"] = self.loss_scale.tensor()
        return state

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
