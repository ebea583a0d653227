"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, ReduceOp, Work
from hvdlm.config import Config
from hvdlm.data.loader import Batch, Loader
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.gradients.sync import GradientSync
from hvdlm.model.loss import IGNORE, token_loss
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import document_ids
from hvdlm.training import checkpoint
from hvdlm.training.agreement import on_first_rank, raise_together
from hvdlm.training.evaluation import evaluate
from hvdlm.training.hardware import seconds_alive
from hvdlm.training.laps import Laps
from hvdlm.training.metrics import MetricsLog
from hvdlm.training.model import make_model
from hvdlm.training.optimizer import make_optimizer, optimizer_tensors, set_learning_rate
from hvdlm.training.precision import LossScale
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_states import gather_to_files, hand_out
from hvdlm.training.replicas import broadcast_tensors, check_replicas
from hvdlm.training.schedule import learning_rate
from hvdlm.training.step_metrics import StepMetrics


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
        self.laps = Laps(device)  # of the last step

    def restore(self, source: checkpoint.Checkpoint | None, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint: rank 0 has it open, the others have its `state` and get the rest sent."""
        tensors = {**self.parameters, **self.optimizer_state}
        if source is not None:
            saved = {**source.model(), **source.optimizer()}
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(saved[name])
        broadcast_tensors(self.communicator, self.optimizer_state.values())
        self.sync.load_state_dict(state["gradients"])
        hand_out(self.communicator, source, self.sync.codec_state(), state["world_size"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.sync.adopt_owed_(self.loss_scale.factor / state["loss_scale"]["factor"])  # changes with precision
        self.step = state["step"]

    def train(self, loader: Loader, preemption: Preemption) -> bool:
        """Runs to the last step and returns True, or False if a signal to any rank asks to stop before."""
        train, save_every = self.config.train, self.config.checkpoint.every
        broadcast_tensors(self.communicator, self.parameters.values())
        self.model.refresh()
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
        """One global batch; returns whether some rank wants to stop."""
        laps = self.laps = Laps(self.device)
        batch, complaint = self._next_batch(loader)
        laps.end("data")

        # Agreed on while the first passes run, before the first gradient is sent: who has no batch sends none.
        tokens = int((batch.targets != IGNORE).sum())
        control = torch.tensor([tokens, int(stop_here), int(complaint is not None)])
        agreement = self.communicator.all_reduce_async_(control, ReduceOp.SUM)

        self._seed_dropout()
        self.sync.begin()
        # The loss is a sum over tokens. It is divided by their usual number now, to keep small numbers in range,
        # and by their true one when that is known.
        usual_tokens = self.config.train.batch_size * self.config.model.context_length
        factor = self.loss_scale.factor / usual_tokens
        micro_batches = self._micro_batches(batch)
        losses = []
        for inputs, targets in micro_batches[:-1]:
            losses.append(self._loss(inputs, targets))
            laps.end("forward")
            (losses[-1] * factor).backward()
            laps.end("backward")
        if micro_batches:
            losses.append(self._loss(*micro_batches[-1]))
            laps.end("forward")
        all_tokens, stop = self._settle(agreement, complaint)
        laps.end("wait")  # for nothing where a GPU is still busy with what the host has queued
        self.sync.last_micro_batch()
        if micro_batches:
            (losses[-1] * factor).backward()
            laps.end("backward")
        self.sync.wait()
        laps.end("wait")

        rate = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        norm = self._apply(usual_tokens / (all_tokens * self.loss_scale.factor), rate)
        laps.end("optimizer")
        self.step += 1
        self.step_metrics.add(time.perf_counter() - laps.begin, laps, self.sync.traffic.codec_seconds)
        if _is_due(self.step, self.config.log.every) or self.step == self.config.train.steps:
            self._log(sum(float(loss.detach()) for loss in losses), all_tokens, rate, norm)
        return stop

    def _next_batch(self, loader: Loader) -> tuple[Batch, str | None]:
        """This rank's part of the next global batch; or an empty one and the reason."""
        try:
            return loader.next(), None
        except HvdlmError as error:
            nothing = torch.empty((0, self.config.model.context_length), dtype=torch.int64)
            return Batch(self.step, nothing, nothing), str(error)

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, (b, T) each, of at most `micro_batch_size` sequences; none if this rank has none."""
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.inputs, batch.targets))
        at_once = self.config.train.micro_batch_size
        if not len(inputs):
            return []
        return list(zip(inputs.split(at_once), targets.split(at_once), strict=True))

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the loss over the tokens of a micro-batch, in nats."""
        documents = document_ids(inputs, self.data.eos_id) if self.config.model.document_mask else None
        hidden = self.model(inputs, documents)  # (b, T, D)
        return token_loss(hidden, self.model.output_weight, targets, self.model.dtype)

    def _settle(self, agreement: Work[Tensor], complaint: str | None) -> tuple[int, bool]:
        """The tokens of the global batch and whether to stop after it; JobError if some rank cannot read its part."""
        tokens, stop, failed = agreement.wait().tolist()
        if failed:
            raise_together(self.communicator, self.communicator.all_gather_object(complaint))
        return tokens, stop > 0

    def _apply(self, correction: float, rate: float) -> float:
        """Clips and applies the summed gradients, which `correction` turns into the mean's; returns its norm."""
        norm = float(self.sync.norm()) * correction
        overflowed = not math.isfinite(norm)
        if self.loss_scale.is_dynamic:
            overflowed = bool(self.communicator.all_reduce_(torch.tensor([int(overflowed)]), ReduceOp.MAX))
            self.sync.scale_owed_(self.loss_scale.update(overflowed))
            if overflowed:
                skipped = f"fp16 gradients overflowed: step skipped, loss scale now {self.loss_scale.factor:g}"
                self._write("event", message=skipped)
                return norm
        if overflowed:
            raise JobError(
                f"the gradient norm is {norm} at step {self.step + 1}: lower optimizer.lr, or resume from the last "
                "checkpoint with other settings"
            )
        clip_norm = self.config.optimizer.clip_norm
        scale = correction * (clip_norm / norm if 0 < clip_norm < norm else 1.0)
        if scale != 1.0:
            self.sync.scale_(scale)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.model.refresh()
        return norm

    def _log(self, loss_sum: float, tokens: int, rate: float, norm: float) -> None:
        numbers = self.step_metrics.collect(loss_sum, tokens, self.sync.traffic)
        self._write("train", lr=rate, grad_norm=norm, tokens=self._tokens_done(), **numbers)

    def _validate(self) -> None:
        if not self.data.validation.shards:
            self._write("event", message="no validation: the data set was prepared without it")
            return
        train = self.config.train
        at_once, limit = train.micro_batch_size, train.evaluate_sequences
        result = evaluate(self.model, self.data, self.communicator, at_once, limit)
        self._write("eval", loss=result.loss, accuracy=result.accuracy, tokens=self._tokens_done())

    def _state(self, loader: Loader) -> dict[str, Any]:
        """What a checkpoint's state.json says."""
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

        self._write("event", message=f"saved {on_first_rank(self.communicator, write)}")

    def open_loader(self) -> Loader:
        """Reads this rank's batches from the next one on."""
        train, communicator = self.config.train, self.communicator
        length, pin = self.config.model.context_length, self.device.type == "cuda"
        share = (communicator.rank, communicator.size)
        ahead = self.config.data.read_ahead
        return Loader(self.data, length, train.batch_size, train.seed, *share, ahead, start=self.step, pin_memory=pin)

    def _write(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, self.step, **values)

    def _tokens_done(self) -> int:
        return self.step * self.config.train.batch_size * self.config.model.context_length

    def _seed_dropout(self) -> None:
        """By seed, step and rank: resuming needs no random-number state."""
        seed = (self.config.train.seed * 1_000_003 + self.step) * 1_000_003 + self.communicator.rank
        torch.manual_seed(seed % 2**63)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
