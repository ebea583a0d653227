"""Dion on several ranks against Dion in plain PyTorch on the joined batch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from checks import check
from commands import infinite_gradient
from torch import Tensor, nn
from training_body import CPU, LOSS_SCALE, RATE, VOCABULARY, Batches, Records, flat, make_config, make_plain_model
from training_body import plain_loss as loss_of_batch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config, Precision
from hvdlm.strategies.dion.strategy import Dion
from hvdlm.strategies.strategy import Report
from hvdlm.training.trainer import Trainer

R, MU, RATIO, DECAY = 5, 0.9, 0.1, 0.02
LAYERS = [
    f"blocks.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
]


def dion_config(
    precision: Precision = "fp32", codec: str = "none", clip_norm: float = 0.0, **compression: object
) -> Config:
    config = make_config(precision, clip_norm, codec)
    dion = {"algorithm": "dion", "dion_rank": R, "dion_momentum": MU, "dion_lr_ratio": RATIO, "weight_decay": DECAY}
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update=dion),
            "compression": config.compression.model_copy(update=compression),
        }
    )


def make_dion_trainer(comm: Communicator, config: Config) -> tuple[Trainer, Dion]:
    """With plain SGD for what Dion leaves, which unlike AdamW forgets no factor."""

    def make_sgd(model: nn.Module, _: object) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for name, each in model.named_parameters() if name not in LAYERS], lr=RATE)

    with patch("hvdlm.training.trainer.make_optimizer", make_sgd):
        trainer = Trainer(config, comm, SimpleNamespace(eos_id=0), VOCABULARY, CPU)
    if trainer.loss_scale.is_dynamic:
        trainer.loss_scale.factor = LOSS_SCALE
    trainer.metrics = Records()
    assert isinstance(trainer.strategy, Dion)
    return trainer, trainer.strategy


class PlainDion:
    """Algorithm 1 of the paper, with Householder's orthonormalisation, in float64; and SGD for the rest."""

    def __init__(self, config: Config, starts: dict[str, Tensor]) -> None:
        """`starts`: Q of each matrix to begin with, (r, n)."""
        self.model = make_plain_model(config).double()
        self._q = {name: start.double().t() for name, start in starts.items()}
        self.momentum = {name: torch.zeros_like(dict(self.model.named_parameters())[name]) for name in starts}
        self._clip = config.optimizer.clip_norm

    def step(self, step: int) -> float:
        """Returns the norm of the gradients of the parameters that Dion does not train."""
        self.model.zero_grad()
        loss_of_batch(self.model, step, ignored=True).backward()
        parameters = dict(self.model.named_parameters())
        others = [each for name, each in parameters.items() if name not in LAYERS]
        norm = nn.utils.clip_grad_norm_(others, self._clip or float("inf"))
        with torch.no_grad():
            for other in others:
                other -= RATE * other.grad
            for name in LAYERS:
                x = parameters[name]
                b = self.momentum[name] + x.grad
                p, _ = torch.linalg.qr(b @ self._q[name])
                r = b.t() @ p
                self.momentum[name] = b - (1 - MU) * p @ r.t()
                self._q[name] = r / r.norm(dim=0)
                x *= 1 - RATE * DECAY
                x -= RATE * RATIO * math.sqrt(x.shape[0] / x.shape[1]) * p @ self._q[name].t()
        return float(norm)


def starts_of(strategy: Dion) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"dion_rank_{R}."): factor.clone()
        for name, factor in strategy.optimizer_state().items()
        if name.startswith("dion_rank_")
    }


@check(sizes=[1, 2, 3], kind=[("fp32", 0.0), ("fp32", 0.2), ("fp16", 0.2)])
def check_ranks_train_as_one_with_the_joined_batch(comm: Communicator, kind: tuple[Precision, float]) -> None:
    """Parameters, and the sum of all momenta, of ranks with unequal numbers of sequences and of targets that count.

    In fp16 some steps overflow on one rank: they are skipped, and leave no trace.
    """
    precision, clip_norm = kind
    trainer, strategy = make_dion_trainer(comm, dion_config(precision, clip_norm=clip_norm))
    starts = starts_of(strategy)
    assert sorted(starts) == sorted(LAYERS)
    plain = PlainDion(trainer.config, starts)
    begin = flat(plain.model)
    overflowing = (2, 4) if precision == "fp16" else ()
    within, done = (1e-4 if precision == "fp32" else 0.05), 0
    for step in range(8):
        overflows = step in overflowing and comm.rank == comm.size - 1
        with infinite_gradient(trainer.model) if overflows else nullcontext():
            trainer.train_step(Batches(comm, step, ignored=True), False)
        if step in overflowing:
            continue
        norm = plain.step(step)
        moved, expected = flat(trainer.model).double() - begin, flat(plain.model) - begin
        assert (moved - expected).norm() <= within * expected.norm(), (step, (moved - expected).norm(), expected.norm())
        record = trainer.metrics.train[done + sum(each < step for each in overflowing)]
        assert abs(record["grad_norm"] / norm - 1) <= within, (step, record["grad_norm"], norm)
        done += 1
    assert all(torch.equal(flat(trainer.model), each) for each in comm.all_gather(flat(trainer.model)))
    state = strategy.rank_state().summed
    for name in LAYERS:
        ours = comm.all_gather(state[f"momentum.{name}"]).sum(0).double() / trainer.loss_scale.factor
        assert (ours - plain.momentum[name]).norm() <= 10 * within * plain.momentum[name].norm(), name


@check(sizes=[1, 2])
def check_no_matter_how_many_tokens_are_planned(comm: Communicator) -> None:
    """Where the batch is to grow, 1 sequence to 7, and has 7 all the time."""
    config = dion_config()
    ramp = {"batch_ramp_start": 1, "batch_ramp_increment": 2, "batch_ramp_steps": 6}
    config = config.model_copy(update={"train": config.train.model_copy(update=ramp)})
    trainer, strategy = make_dion_trainer(comm, config)
    plain = PlainDion(config, starts_of(strategy))
    begin = flat(plain.model)
    for step in range(6):
        trainer.train_step(Batches(comm, step, ignored=True), False)
        plain.step(step)
        moved, expected = flat(trainer.model).double() - begin, flat(plain.model) - begin
        assert (moved - expected).norm() <= 1e-4 * expected.norm(), (step, (moved - expected).norm(), expected.norm())


@check(sizes=[2, 3])
def check_what_travels(comm: Communicator) -> None:
    """r (m + n) numbers a matrix, and all others by their codec; a rank sends 2 (P - 1) / P of them."""
    trainer, strategy = make_dion_trainer(comm, dion_config())
    trainer.train_step(Batches(comm, 0, ignored=True), False)
    width, mlp = 64, 256
    factors = 2 * R * ((3 * width + width) + (width + width) + (mlp + width) + (width + mlp))
    biases = 2 * (3 * width + width + mlp + width + 4 * width) + 2 * width
    others = VOCABULARY * width + 16 * width + biases
    expected = 2 * (comm.size - 1) * 4 * (factors + others) / comm.size
    assert abs(strategy.sync.traffic.wire_bytes / expected - 1) < 0.01, (strategy.sync.traffic, expected)
    whole = 2 * (comm.size - 1) * 4 * flat(trainer.model).numel() / comm.size
    assert abs(strategy.sync.traffic.dense_bytes / whole - 1) < 0.01


@check(sizes=[3], codec=["int4", "topk"])
def check_other_parameters_by_any_codec(comm: Communicator, codec: str) -> None:
    trainer, strategy = make_dion_trainer(comm, dion_config(codec=codec))
    plain = PlainDion(trainer.config, starts_of(strategy))
    begin, batches = flat(plain.model), Batches(comm, 0, ignored=True)
    for step in range(6):
        trainer.train_step(batches, False)
        plain.step(step)
    kinds = {name.split(".")[0] for name in strategy.rank_state().summed}
    assert kinds == {"residual", "momentum"}
    assert not any(f"residual.{name}" in strategy.rank_state().summed for name in LAYERS)
    moved, expected = flat(trainer.model).double() - begin, flat(plain.model) - begin
    assert (moved - expected).norm() <= 0.5 * expected.norm(), ((moved - expected).norm(), expected.norm())
    assert all(torch.equal(flat(trainer.model), each) for each in comm.all_gather(flat(trainer.model)))


@check(sizes=[2])
def check_a_momentum_that_is_not_finite_ends_training(comm: Communicator) -> None:
    """On all ranks, though only one has made it, and of one matrix only."""
    trainer, strategy = make_dion_trainer(comm, dion_config())
    strategy.begin_step(Report(100)).wait()
    trainer.model.output_weight.sum().backward()
    if comm.rank == 1:
        trainer.model.blocks[1].mlp.up.weight.grad = torch.full((256, 64), math.inf)
    strategy.wait()
    assert math.isnan(strategy.norm())


@check(sizes=[4], needs="split")
def check_sums_within_nodes_first(comm: Communicator) -> None:
    """The momentum is that of the local leaders, and the training that of all ranks."""
    config = dion_config(hierarchical=True)
    with patch("socket.gethostname", lambda: f"n{comm.rank // 2}"):
        trainer, strategy = make_dion_trainer(comm, config)
        assert strategy.sync.channels[0].hierarchy is not None
    plain = PlainDion(trainer.config, starts_of(strategy))
    begin, batches = flat(plain.model), Batches(comm, 0, ignored=True)
    for step in range(4):
        trainer.train_step(batches, False)
        plain.step(step)
    moved, expected = flat(trainer.model).double() - begin, flat(plain.model) - begin
    assert (moved - expected).norm() <= 1e-4 * expected.norm(), ((moved - expected).norm(), expected.norm())
    momenta = [tensor for name, tensor in strategy.rank_state().summed.items() if name.startswith("momentum.")]
    assert any(each.any() for each in momenta) == (comm.rank in (0, 2))
