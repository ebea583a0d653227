"""Muon on several ranks: each matrix is orthogonalised once, and the outcome is that of one rank, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import torch
from checks import check
from torch import Tensor
from training_body import CPU, SEQUENCES, VOCABULARY, Batches, Records, flat, make_config, make_plain_model
from training_body import plain_loss as loss_of_batch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.strategies.hidden_matrices import hidden_matrices
from hvdlm.strategies.muon import optimizer as muon
from hvdlm.strategies.muon.optimizer import MuonAdamW
from hvdlm.strategies.optimizer import make_optimizer
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
            patch.object(muon, "_ROUND_BYTES", 1 if step % 2 else 2**25),
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
