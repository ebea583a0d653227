"""Muon on several ranks: each matrix is orthogonalised once, and the outcome is that of one rank, bit for bit.

Also where ranks own slices of matrices (ZeRO): what is orthogonalised is then sent to one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import sharded_body
import torch
from checks import check
from commands import infinite_gradient
from sharded_body import Plain, assert_steps_of, difference
from torch import Tensor
from training_body import CPU, SEQUENCES, VOCABULARY, Batches, Records, flat, make_config, make_plain_model
from training_body import plain_loss as loss_of_batch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.gradients.exchange import Exchange
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.hidden_matrices import hidden_matrices
from hvdlm.strategies.muon import optimizer as muon
from hvdlm.strategies.muon import shares, slices
from hvdlm.strategies.muon.optimizer import MOMENTUM, MuonAdamW
from hvdlm.strategies.optimizer import make_optimizer
from hvdlm.strategies.sharded.strategy import Sharded
from hvdlm.training.trainer import Trainer

RATE = 0.02


def muon_config(clip_norm: float = 0.0, codec: str = "none", local_every: int = 0) -> Config:
    config = make_config("fp32", clip_norm, codec, local_every)
    changed = {"algorithm": "muon", "lr": RATE, "weight_decay": 0.02}
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=changed)})


def make_trainer(comm: Communicator, config: Config) -> Trainer:
    trainer = Trainer(config, comm, SimpleNamespace(eos_id=0), VOCABULARY, CPU)
    trainer.metrics = Records()
    return trainer


@check(sizes=[1, 2, 3, 4], trained=[8, 3])
def check_each_matrix_once(comm: Communicator, trained: int) -> None:
    """Of 3 matrices on 4 ranks one rank has none. In rounds of one matrix a rank, and in one."""
    model, alone = make_plain_model(muon_config()), make_plain_model(muon_config())
    for each in (model, alone):
        for matrix in list(hidden_matrices(each).values())[trained:]:
            matrix.requires_grad_(False)
    settings = muon_config().optimizer
    ours, plain = make_optimizer(model, settings), make_optimizer(alone, settings)
    assert isinstance(ours, MuonAdamW)
    ours.deal_out_among(comm)
    calls = 0
    original = muon.orthogonalise

    def counting(matrix: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(matrix)

    for step in range(4):
        for each in (model, alone):
            generator = torch.Generator().manual_seed(step)
            for parameter in each.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        with (
            patch.object(muon, "orthogonalise", counting),
            patch.object(shares, "_ROUND_BYTES", 1 if step % 2 else 2**25),
        ):
            ours.step()
        plain.step()
        assert torch.equal(flat(model), flat(alone))
    assert int(comm.all_reduce_(torch.tensor([calls]))) == 4 * trained
    matrices = sum(each.numel() for each in hidden_matrices(model).values())
    assert int(comm.all_reduce_(torch.tensor([ours.sent_bytes]))) == 2 * (comm.size - 1) * matrices


@check(sizes=[1, 2, 3], clip_norm=[0.0, 0.3])
def check_ranks_train_as_pytorch_does_on_the_joined_batch(comm: Communicator, clip_norm: float) -> None:
    """torch.optim.Muon and AdamW; ranks have unequal numbers of sequences and of targets that count."""
    trainer, plain = make_trainer(comm, muon_config(clip_norm)), make_plain_model(muon_config())
    batches, begin = Batches(comm, 0, ignored=True), flat(plain)
    named = dict(plain.named_parameters())
    matrices = [named.pop(name) for name in hidden_matrices(plain)]
    others = list(named.values())
    optimizers = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([each for each in others if each.dim() > 1], lr=RATE, betas=(0.9, 0.95), weight_decay=0.02),
        torch.optim.AdamW([each for each in others if each.dim() < 2], lr=RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for step in range(5):
        trainer.train_step(batches, False)
        plain.zero_grad()
        loss_of_batch(plain, step, ignored=True).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = flat(trainer.model) - begin, flat(plain) - begin
    # Sums of gradients are rounded otherwise, then to bfloat16, and AdamW's first steps are by their signs
    assert (moved - expected).norm() <= 0.04 * expected.norm(), ((moved - expected).norm(), expected.norm())
    assert all(torch.equal(flat(trainer.model), each) for each in comm.all_gather(flat(trainer.model)))


@check(sizes=[2, 3], codec=["int4", "topk"])
def check_any_codec(comm: Communicator, codec: str) -> None:
    trainer, batches = make_trainer(comm, muon_config(codec=codec)), Batches(comm, 0, ignored=True)
    losses = []
    for _ in range(8):
        trainer.train_step(batches, False)
        losses.append(trainer.metrics.train[-1]["loss"])
    assert all(torch.equal(flat(trainer.model), each) for each in comm.all_gather(flat(trainer.model)))
    wire = trainer.strategy.traffic.wire_bytes - trainer.strategy.sync.traffic.wire_bytes
    matrices = sum(each.numel() for each in hidden_matrices(trainer.model).values())
    assert int(comm.all_reduce_(torch.tensor([wire]))) == 2 * (comm.size - 1) * matrices


@check(sizes=[2, 3])
def check_alone_in_local_steps(comm: Communicator) -> None:
    """Ranks whose gradients differ orthogonalise all matrices, each its own."""
    trainer, batches = make_trainer(comm, muon_config(local_every=3)), Batches(comm, 0, ignored=True)
    assert comm.size < SEQUENCES
    for step in range(1, 7):
        trainer.train_step(batches, False)
        ours = comm.all_gather(flat(trainer.model))
        assert all(torch.equal(ours[0], each) for each in ours[1:]) == (step % 3 == 0)
    assert trainer.optimizer.sent_bytes == 0


def sharded_config(
    stage: int, data: int = 0, precision: str = "fp32", codec: str = "none", **changed: object
) -> Config:
    """Of a model whose matrices are cut within their rows; micro-batches of 2."""
    settings = {"algorithm": "muon", "lr": RATE, "weight_decay": 0.02, "clip_norm": 0.0, **changed}
    return sharded_body.make_config("odd", stage, data, precision, codec=codec, optimizer=settings)


def numbers_of_matrices() -> list[int]:
    model = Transformer(sharded_config(0).model, VOCABULARY)
    return [each.numel() for each in hidden_matrices(model).values()]


@check(sizes=[1, 2, 3, 4], stage=[1, 2, 3], adjustment=["match_rms_adamw", "original"])
def check_slices_step_as_matrices_do(comm: Communicator, stage: int, adjustment: str) -> None:
    """By the same gradients, bit for bit. In rounds of one matrix a rank, or in one. All else is AdamW's."""
    config = sharded_config(stage, muon_adjustment=adjustment)
    calls = {"orthogonalise": 0, "exchange": 0}
    original, exchange = slices.orthogonalise, Exchange.all_to_all_v

    def counting(matrix: Tensor) -> Tensor:
        calls["orthogonalise"] += 1
        return original(matrix)

    def exchanging(own: Exchange, messages: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        calls["exchange"] += 1
        return exchange(own, messages, lengths)

    with patch.object(shares, "_ROUND_BYTES", 1 if adjustment == "original" else 2**25):
        trainer = sharded_body.make_trainer(comm, config)
    held, alone = trainer.strategy.held_parts(), Plain(config).model
    assert isinstance(trainer.strategy, Sharded) and held is not None
    plain = make_optimizer(alone, config.optimizer)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in alone.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            for start, stop in held.runs.get(name, ()):
                trainer.parameters[name].grad.copy_(parameter.grad.reshape(-1)[start:stop])
        with (
            patch.object(slices, "orthogonalise", counting),
            patch.object(Exchange, "all_to_all_v", exchanging),
        ):
            trainer.strategy.apply(RATE)
            trainer.strategy.arrive()
        plain.param_groups[0]["lr"] = plain.param_groups[1]["lr"] = RATE
        plain.step()
        matrices = hidden_matrices(alone)
        for name, parameter in alone.named_parameters():
            for start, stop in held.runs.get(name, ()):
                ours, theirs = trainer.parameters[name], parameter.detach().reshape(-1)[start:stop]
                # PyTorch's AdamW rounds by where a number stands among those that a vector register holds
                are_equal = torch.equal if name in matrices else torch.allclose
                assert are_equal(ours, theirs), (step, name)
    count = len(numbers_of_matrices())
    assert int(comm.all_reduce_(torch.tensor([calls["orthogonalise"]]))) == 3 * count
    rounds = calls["exchange"] / (3 * 2)
    assert rounds >= count / comm.size if adjustment == "original" else rounds == 1
    trainer.strategy.close()


@check(sizes=[2, 3, 4], stage=[1, 2, 3])
def check_shards_train_as_pytorch_does(comm: Communicator, stage: int) -> None:
    """torch.optim.Muon and AdamW on the joined batch; of four ranks two groups hold a copy of the model each."""
    config = sharded_config(stage, data=2 if comm.size == 4 else 0, clip_norm=0.3)
    trainer, plain = sharded_body.make_trainer(comm, config), Plain(config)
    # Sums of gradients are rounded otherwise, then to bfloat16
    assert_steps_of(trainer, plain, 5, factor=1e3)
    assert difference(comm, trainer, plain) <= 0.04
    trainer.strategy.close()


@check(sizes=[4], stage=[0, 1])
def check_stages_train_as_pytorch_does(comm: Communicator, stage: int) -> None:
    """A pipeline of two stages with two replicas each, which share out the matrices of their stage."""
    values = sharded_body.make_config("llama", stage).model_dump(by_alias=True)
    values["optimizer"].update(algorithm="muon", lr=RATE, weight_decay=0.02)
    values["parallel"]["pipeline"] = 2
    config = Config.model_validate(values)
    trainer, plain = sharded_body.make_trainer(comm, config), Plain(config)
    assert_steps_of(trainer, plain, 5, factor=1e3)
    trainer.strategy.close()


@check(sizes=[2], precision=["fp32", "bf16"])
def check_shards_train_as_whole_models_do(comm: Communicator, precision: str) -> None:
    """Two ranks with a micro-batch each: nothing is rounded otherwise, so nothing differs. Momentum is divided."""
    curves, averages = [], []
    for stage in (0, 1, 2, 3):
        values = sharded_config(stage, precision=precision).model_dump(by_alias=True)
        values["train"].update(micro_batch_size=4, ema=0.9)
        trainer = sharded_body.make_trainer(comm, Config.model_validate(values))
        batches = Batches(comm, 0, ignored=True)
        for _ in range(6):
            trainer.train_step(batches, False)
        curves.append([(record["loss"], record["grad_norm"]) for record in trainer.metrics.train])
        squares = sum((each.double().square().sum() for each in trainer.ema.state().values()), torch.zeros(()).double())
        averages.append(float(squares if stage == 0 else comm.all_reduce_(squares.float())))
        state = {name: each for name, each in trainer.optimizer_state().items() if name.startswith(MOMENTUM)}
        kept = sum(each.numel() for each in state.values())
        assert int(comm.all_reduce_(torch.tensor([kept]))) == sum(numbers_of_matrices()) * (2 if stage == 0 else 1)
        trainer.strategy.close()
    assert all([loss for loss, _ in curve] == [loss for loss, _ in curves[0]] for curve in curves[1:]), curves
    assert all(abs(each / averages[0] - 1) <= 1e-6 for each in averages), averages


@check(sizes=[3], stage=[1, 3])
def check_bytes_of_shards(comm: Communicator, stage: int) -> None:
    """Of a matrix, what the rank that orthogonalises it does not own is sent there and back, in 2 bytes a number."""
    sent = []
    for algorithm in ("muon", "adamw"):
        trainer = sharded_body.make_trainer(comm, sharded_config(stage, codec="int4", algorithm=algorithm))
        batches = Batches(comm, 0, ignored=True)
        for _ in range(2):
            trainer.train_step(batches, False)
        sent.append(trainer.strategy.traffic.wire_bytes)
        if algorithm == "muon":
            held = trainer.strategy.held_parts()
        trainer.strategy.close()
    assert held is not None
    matrices = [name for name, shape in held.shapes.items() if name.startswith("blocks.") and len(shape) == 2]
    own = torch.tensor([sum(stop - start for start, stop in held.runs.get(name, ())) for name in matrices])
    owned = comm.all_gather(own)  # (ranks, matrices)
    assert owned.sum(dim=0).tolist() == [held.shapes[name][0] * held.shapes[name][1] for name in matrices]
    between = int(comm.all_reduce_(torch.tensor([sent[0] - sent[1]])))
    least, most = ((owned.sum(dim=0) - part).sum() for part in (owned.amax(dim=0), owned.amin(dim=0)))
    assert 2 * 2 * least <= between <= 2 * 2 * most, (between, least, most)


@check(sizes=[2], stage=[1, 2, 3])
def check_shards_leave_out_a_step(comm: Communicator, stage: int) -> None:
    """In fp16 a step overflows on one rank: parameters and momentum stay as they are on all."""
    trainer = sharded_body.make_trainer(comm, sharded_config(stage, precision="fp16", codec="int4"))
    trainer.loss_scale.factor = 2.0**10
    batches = Batches(comm, 0, ignored=False)
    for step in range(4):
        tensors = {**trainer.parameters, **trainer.optimizer_state()}
        before = {name: each.detach().clone() for name, each in tensors.items()}
        overflows = step == 1 and comm.rank == 1
        with infinite_gradient(trainer.model) if overflows else nullcontext():
            trainer.train_step(batches, False)
        assert all(torch.equal(before[name], each) == (step == 1) for name, each in tensors.items()), step
    trainer.strategy.close()
