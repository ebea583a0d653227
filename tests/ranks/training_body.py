"""The training step against plain PyTorch on the joined batch, with an optimizer that forgets no factor: SGD.

AdamW divides by the size of gradients, so that it takes nearly the same steps whatever they are multiplied by.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from checks import check
from commands import infinite_gradient
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config, Precision
from hvdlm.data.loader import Batch
from hvdlm.model.transformer import Transformer
from hvdlm.targets import IGNORE
from hvdlm.training.saved_state import restore
from hvdlm.training.trainer import Trainer

VOCABULARY, LENGTH, SEQUENCES = 61, 16, 7
RATE = 0.5
LOSS_SCALE = 2.0**10
CPU = torch.device("cpu")


def make_config(precision: Precision, clip_norm: float, codec: str = "none", local_every: int = 0) -> Config:
    """SGD's rate is constant: without warm-up, `wsd` begins to fall only after a thousand steps."""
    return Config.model_validate(
        {
            "model": {"layers": 2, "heads": 2, "width": 64, "context_length": LENGTH},
            "train": {"global_batch_size": SEQUENCES, "micro_batch_size": 2, "precision": precision, "steps": 2000},
            "optimizer": {"lr": RATE, "clip_norm": clip_norm, "schedule": "wsd", "warmup_steps": 0},
            "compression": {"codec": codec, "density": 0.05},
            "comm": {"bucket_mb": 40_000 / 2**20},
            "local_steps": {"every": local_every},
            "log": {"every": 1},
        }
    )


def global_batch(step: int, ignored: bool) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (SEQUENCES, LENGTH) each; if `ignored`, the last sequences have few targets that count."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if ignored:
        targets[-3:, 2:] = IGNORE
    return inputs, targets


class Batches:
    """A loader of global batches: the part of one rank."""

    def __init__(self, comm: Communicator, start: int, ignored: bool) -> None:
        self._part = slice(comm.rank * SEQUENCES // comm.size, (comm.rank + 1) * SEQUENCES // comm.size)
        self._step, self._ignored = start, ignored

    def next(self) -> Batch:
        inputs, targets = global_batch(self._step, self._ignored)
        self._step += 1
        return Batch(self._step - 1, inputs[self._part], targets[self._part])


class Records:
    """Instead of metrics.jsonl."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.events: list[str] = []

    def write(self, kind: str, step: int, **values: Any) -> None:
        if kind == "train":
            self.train.append(values)
        else:
            self.events.append(values["message"])


def make_trainer(comm: Communicator, config: Config) -> Trainer:
    """With plain SGD, and a loss scale at which nothing overflows."""

    def make_sgd(model: nn.Module, _: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=RATE)

    with patch("hvdlm.training.trainer.make_optimizer", make_sgd):
        trainer = Trainer(config, comm, SimpleNamespace(eos_id=0), VOCABULARY, CPU)
    if trainer.loss_scale.is_dynamic:
        trainer.loss_scale.factor = LOSS_SCALE
    trainer.metrics = Records()
    return trainer


def plain_loss(model: Transformer, step: int, ignored: bool) -> Tensor:
    """Mean over the tokens of the global batch that count, in fp32."""
    inputs, targets = global_batch(step, ignored)
    logits = functional.linear(model(inputs), model.token_embedding.weight)  # (B, T, V)
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1), ignore_index=-100)


def make_plain_model(config: Config) -> Transformer:
    model = Transformer(config.model, VOCABULARY)
    model.initialise(config.train.seed)
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@check(sizes=[1, 3], precision=["fp32", "fp16"], clip_norm=[0.0, 0.3])
def check_steps_of_sgd(comm: Communicator, precision: Precision, clip_norm: float) -> None:
    """Five steps: parameters, loss and norm are those of PyTorch's own loss, `clip_grad_norm_` and SGD.

    Ranks have different numbers of sequences and of targets that count.
    """
    config = make_config(precision, clip_norm)
    trainer, batches = make_trainer(comm, config), Batches(comm, 0, ignored=True)
    plain = make_plain_model(config)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    begin = flat(plain)
    assert torch.equal(flat(trainer.model), begin)
    within = 1e-5 if precision == "fp32" else 0.02
    norms = []
    for step in range(5):
        trainer.train_step(batches, False)
        optimizer.zero_grad()
        loss = plain_loss(plain, step, ignored=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or float("inf"))
        optimizer.step()
        norms.append(float(norm))
        moved, expected = flat(trainer.model) - begin, flat(plain) - begin
        assert (moved - expected).norm() <= within * expected.norm(), (step, (moved - expected).norm(), expected.norm())
        record = trainer.metrics.train[step]
        assert abs(record["grad_norm"] / float(norm) - 1) <= within, (step, record["grad_norm"], norm)
        assert abs(record["loss"] / float(loss) - 1) <= within, (step, record["loss"], loss)
    assert not trainer.metrics.events  # no step was skipped
    assert min(norms) > 0.3  # so 0.3 clips them all


@check(sizes=[1, 3], local_every=[0, 3])
def check_gradients_that_are_not_finite(comm: Communicator, local_every: int) -> None:
    """In steps 1 and 3 of 5, of one rank: all ranks stay where they are, and the rest is SGD on the other batches.

    With local steps only that rank stays, so that the averages are those of plain models, one a rank.
    """
    trainer, batches = make_trainer(comm, make_config("fp32", 0.3, local_every=local_every)), Batches(comm, 0, False)
    plain = make_plain_model(trainer.config)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    begin = flat(plain)
    for step in range(5):
        before = flat(trainer.model)
        overflows = step in (1, 3) and comm.rank == comm.size - 1
        with infinite_gradient(trainer.model) if overflows else nullcontext():
            trainer.train_step(batches, False)
        stays = overflows if local_every else step in (1, 3)
        if step + 1 != local_every:  # no average in this step
            assert torch.equal(flat(trainer.model), before) == stays, step
        if local_every or stays:
            continue
        optimizer.zero_grad()
        plain_loss(plain, step, ignored=False).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
        moved, expected = flat(trainer.model) - begin, flat(plain) - begin
        assert (moved - expected).norm() <= 1e-5 * expected.norm(), (step, (moved - expected).norm(), expected.norm())
    assert bool(flat(trainer.model).isfinite().all())
    said = [f"step {step} is left out: the gradient of final_norm.weight is not finite" for step in (2, 4)]
    told = comm.rank == comm.size - 1 or not local_every
    assert [event.partition(" (batch")[0] for event in trainer.metrics.events] == (said if told else [])


class Saved:
    """A checkpoint in memory, as rank 0 has one open."""

    def __init__(self, model: dict[str, Tensor], ranks: list[dict[str, Tensor]]) -> None:
        self._model, self._ranks = model, ranks

    def model(self) -> dict[str, Tensor]:
        return self._model

    def optimizer(self) -> dict[str, Tensor]:
        return {}

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        return self._ranks[rank]


def resumed(comm: Communicator, trainer: Trainer) -> Trainer:
    """A new trainer that goes on where `trainer` is."""
    residuals = comm.all_gather_object(
        {name: tensor.clone() for name, tensor in trainer.strategy.sync.codec_state().items()}
    )
    source = Saved({name: tensor.detach().clone() for name, tensor in trainer.parameters.items()}, residuals)
    state = {
        "gradients": trainer.strategy.sync.state_dict(),
        "loss_scale": trainer.loss_scale.state_dict(),
        "world_size": comm.size,
        "config": trainer.config.model_dump(),
        "step": trainer.step,
    }
    again = make_trainer(comm, trainer.config)
    restore(again, source if comm.rank == 0 else None, state)
    return again


@check(sizes=[2, 3], codec=["topk", "powersgd", "int4"])
def check_fp16_overflow_with_lossy_codecs(comm: Communicator, codec: str) -> None:
    """Steps 2 and 6 of 9 overflow on one rank, and a checkpoint lies between: all skip them, and nothing is lost.

    What SGD has applied and what the residuals still hold, both over the loss scale, are together the gradients of all
    steps that were not skipped, by PyTorch in fp32 at the same parameters.
    """
    trainer = make_trainer(comm, make_config("fp16", clip_norm=0.0, codec=codec))
    plain = make_plain_model(trainer.config)
    begin = flat(trainer.model)
    gradients = torch.zeros_like(begin)
    factors = []
    for step in range(9):
        if step == 4:
            trainer = resumed(comm, trainer)
        before = flat(trainer.model)
        overflows = step in (2, 6) and comm.rank == comm.size - 1
        with infinite_gradient(trainer.model) if overflows else nullcontext():
            trainer.train_step(Batches(comm, step, ignored=False), False)
        factors.append(trainer.loss_scale.factor)
        after = flat(trainer.model)
        assert torch.equal(after, before) == (step in (2, 6)), step
        assert all(torch.equal(after, other) for other in comm.all_gather(after)), step
        if step not in (2, 6):
            nn.utils.vector_to_parameters(before, plain.parameters())
            plain.zero_grad()
            plain_loss(plain, step, ignored=False).backward()
            gradients += torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert factors == [LOSS_SCALE] * 2 + [LOSS_SCALE / 2] * 4 + [LOSS_SCALE / 4] * 3
    assert comm.all_gather_object(trainer.step) == [9] * comm.size
    state = trainer.strategy.sync.codec_state()
    own = torch.cat([state[f"residual.{name}"].flatten() for name in trainer.parameters])
    residual = comm.all_gather(own).sum(0) / trainer.loss_scale.factor
    applied = (begin - flat(trainer.model)) / RATE
    lost = applied + residual - gradients
    assert residual.norm() > 0.01 * gradients.norm(), (residual.norm(), gradients.norm())
    assert lost.norm() <= 0.1 * residual.norm(), (lost.norm(), residual.norm())
