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
        self.metrics: MetricsLog | None = None  # rank 0 has one
        flops = flops_per_token(config.model, vocab_size)
        self.step_metrics = StepMetrics(communicator, device, config.train.precision, flops)
        self.timer = StepTimer(device)  # of the last step
        # Tokens of a global batch in which every target counts
        self.nominal_tokens = config.train.global_batch_size * config.model.context_length

    def restore(self, source: checkpoint.Checkpoint | None, state: dict[str, Any]) -> None:
        """Restores a checkpoint, which rank 0 has open as `source`; all ranks have its `state`. Collective."""
        tensors = {**self.parameters, **self.optimizer_state}
        if source is not None:
            saved = {**source.model(), **source.optimizer()}
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(saved[name])
        broadcast_tensors(self.communicator, self.optimizer_state.values())
        self.sync.load_state_dict(state["gradients"])
        scatter_from_checkpoint(self.communicator, source, self.sync.codec_state(), state["world_size"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.sync.restore_residuals_(self.loss_scale.factor / state["loss_scale"]["factor"])  # precision may differ
        self.step = state["step"]

    def train(self, loader: Loader, preemption: Preemption) -> bool:
        """Runs to the last step and returns True, or False if a signal to any rank asks to stop before."""
        train, save_every = self.config.train, self.config.checkpoint.every
        broadcast_tensors(self.communicator, self.parameters.values())
        self.model.update_low_precision_weights()
        first, stop = self.step + 1, False
        while self.step < train.steps and not stop:
            stop = self.train_step(loader, preemption.requested)
            if self.step == first:
                self._write("event", message=f"first step done, {seconds_alive():.1f} s after the process began")
            at_end = self.step == train.steps
            if at_end or _is_due(self.step, train.evaluate_every):
                self._validate()
            if _is_due(self.step, train.check_replicas_every):
                check_replicas(self.communicator, self.parameters, self.step)
            if at_end or stop or _is_due(self.step, save_every):
                self._save(loader)
        return self.step == train.steps

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
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            loss = self._forward(inputs, targets)
            losses.append(loss.detach())
            timer.end_phase("forward")
            if number == len(micro_batches):
                totals = self._wait_for_totals(reduction, error)
                self.sync.set_last_micro_batch()  # gradients are final from here on: buckets are reduced when ready
            # The loss is a sum over tokens: it is divided by their nominal number, to keep gradients in range
            (loss * (self.loss_scale.factor / self.nominal_tokens)).backward()
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
            self._log(sum(map(float, losses)), totals.tokens, rate, norm)
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
        """The totals of all ranks. Raises JobError on all ranks if some rank could not read its part of the batch."""
        tokens, stops, errors = reduction.wait().tolist()
        if errors:
            raise_on_all_ranks(self.communicator, self.communicator.all_gather_object(error))
        self.timer.end_phase("wait")  # on a GPU, zero while it is busy with what the host has queued
        return Totals(tokens, stops > 0)

    def _forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the loss over the tokens of a micro-batch, in nats."""
        documents = document_ids(inputs, self.data.eos_id) if self.config.model.document_mask else None
        hidden = self.model(inputs, documents)  # (b, T, D)
        return token_loss(hidden, self.model.output_weight, targets, self.model.dtype)

    def _norm(self, unscale: float) -> float:
        """Global norm of the gradients of the mean loss, equal on all ranks."""
        return float(self.sync.norm()) * unscale

    def _skip_step(self, norm: float) -> bool:
        """Whether fp16 gradients overflowed on some rank, so that this step is skipped; adapts the loss scale.

        Raises JobError if the norm is not finite in another precision.
        """
        if not self.loss_scale.is_dynamic:
            if not math.isfinite(norm):
                raise JobError(
                    f"the gradient norm is {norm} at step {self.step + 1}: lower optimizer.lr, or resume from the last "
                    "checkpoint with other settings"
                )
            return False
        overflowed = torch.tensor([int(not math.isfinite(norm))])
        skip = bool(self.communicator.all_reduce_(overflowed, ReduceOp.MAX))
        self.sync.scale_residuals_(self.loss_scale.update(skip))
        if skip:
            factor = self.loss_scale.factor
            self._write("event", message=f"fp16 gradients overflowed: step skipped, loss scale now {factor:g}")
        return skip

    def _scale_and_clip(self, unscale: float, norm: float) -> None:
        """Makes the summed gradients those of the mean loss, whose norm is `norm`, and clips their global norm."""
        clip_norm = self.config.optimizer.clip_norm
        factor = unscale * (clip_norm / norm if 0 < clip_norm < norm else 1.0)
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

    def _validate(self) -> None:
        if not self.data.validation.shards:
            self._write("event", message="no validation: the data set was prepared without it")
            return
        train = self.config.train
        result = evaluate(self.model, self.data, self.communicator, train.micro_batch_size, train.evaluate_sequences)
        self._write("eval", loss=result.loss, accuracy=result.accuracy, tokens=self._tokens_done())

    def _state(self, loader: Loader) -> dict[str, Any]:
        """The contents of a checkpoint's state.json."""
        return {
            "step": self.step,
            "data": loader.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "gradients": self.sync.state_dict(),
            "config": self.config.model_dump(),
            "vocab_size": self.model.vocab_size,
            "world_size": self.communicator.size,
            "fingerprint": self.data.fingerprint,
            "versions": checkpoint.versions(),
        }

    def _save(self, loader: Loader) -> None:
        parent, keep = checkpoint.directory(self.config.train.run_dir), self.config.checkpoint.keep
        ranks = gather_to_files(self.communicator, self.sync.codec_state(), parent)

        def write() -> Path:
            tensors, tokenizer = (self.parameters, self.optimizer_state), self.data.tokenizer_path
            return checkpoint.save(parent, self.step, *tensors, self._state(loader), tokenizer, keep, ranks)

        self._write("event", message=f"saved {on_rank_0(self.communicator, write)}")

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
