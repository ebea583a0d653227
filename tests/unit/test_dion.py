"""Dion's settings, its parameters, and its momentum on one rank."""

from __future__ import annotations

import pytest
import torch
from thread_rank import on_threads
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import CompressionSection, ModelSection, OptimizerSection
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.exchange import Exchange
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.dion.matrices import matrix_rank
from hvdlm.strategies.dion.momentum import MatrixMomentum
from hvdlm.strategies.hidden_matrices import hidden_matrices
from hvdlm.strategies.optimizer import make_optimizer

SHAPES = {"a": (12, 20), "b": (20, 12)}


def make_momentum(matrix_rank: int, momentum: float = 0.9) -> MatrixMomentum:
    bucket = Bucket({name: nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()})
    return MatrixMomentum(bucket, CompressionSection(), matrix_rank, momentum)


def drawn(seed: int) -> Tensor:
    return torch.randn(480, generator=torch.Generator().manual_seed(seed))


def alone() -> Exchange:
    return Exchange(SoloCommunicator(), None, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--local_steps.every", "4"],
            "'dion' exchanges momentum at every step: it does not go with local_steps.every",
        ),
        (["--compression.codec", "auto"], "name a codec for those that optimizer.algorithm = 'dion' leaves to AdamW"),
        (["--optimizer.dion_rank", "129"], "optimizer.dion_rank = 129 is more than model.width = 128"),
        (["--optimizer.dion_rank", "2.5"], "dion_rank = 2.5 is neither a share below 1 nor a whole number"),
        (["--optimizer.dion_rank", "0"], "optimizer.dion_rank"),
        (["--optimizer.dion_momentum", "1.0"], "optimizer.dion_momentum"),
    ],
)
def test_bad_settings_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(HvdlmError, match=message) as error:
        load(None, ["--optimizer.algorithm", "dion", *words], PRESETS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("setting", "rank"), [(0.125, 16), (0.01, 2), (1, 1), (7, 7), (128, 128)])
def test_rank_is_a_share_of_the_width_or_a_number(setting: float, rank: int) -> None:
    assert matrix_rank(OptimizerSection(dion_rank=setting), ModelSection(width=128)) == rank


def test_adamw_has_what_is_no_matrix_of_a_block() -> None:
    section = ModelSection(layers=2, width=32, heads=2, context_length=8, tie_embeddings=False, activation="swiglu")
    model = Transformer(section, 50)
    matrices = hidden_matrices(model)
    assert len(matrices) == 2 * 4
    optimizer = make_optimizer(model, OptimizerSection(algorithm="dion"))
    ours = {id(each) for group in optimizer.param_groups for each in group["params"]}
    theirs = {name for name, each in model.named_parameters() if id(each) in ours}
    assert theirs.isdisjoint(matrices) and theirs | set(matrices) == set(dict(model.named_parameters()))
    assert {"token_embedding.weight", "position_embedding.weight", "output.weight"} <= theirs
    assert {id(each) for each in optimizer.state} == ours
    everything = make_optimizer(model, OptimizerSection())
    assert sum(len(group["params"]) for group in everything.param_groups) == len(dict(model.named_parameters()))


def test_at_full_rank_the_update_is_orthogonal_and_nothing_is_left() -> None:
    """As many vectors as the matrix has rows: all of it is used, and a momentum of 0 keeps none.

    Of one gradient again and again the power iteration finds the singular vectors: then P Q^T is the polar factor.
    """
    momentum = make_momentum(12, momentum=0.0)
    gradient = drawn(0)
    u, _, vt = torch.linalg.svd(gradient[:240].view(12, 20).double(), full_matrices=False)
    for step in range(400):
        update = gradient.clone()
        momentum.reduce_(update, alone(), step)
    assert momentum.state()["momentum"].norm() <= 1e-4 * gradient.norm()
    assert (update[:240].view(12, 20) - u @ vt).norm() <= 0.02 * 12**0.5


def test_the_update_does_not_depend_on_the_scale_of_gradients() -> None:
    updates = []
    for factor in (1.0, 2.0**-20):
        momentum = make_momentum(3)
        momentum.gradient_scale = factor
        for step in range(5):
            update = drawn(step)
            momentum.reduce_(update, alone(), step)
        updates.append(update)
    assert torch.equal(*updates)


def test_what_is_not_used_stays_in_the_momentum() -> None:
    """By hand: M - (1 - mu) P P^T M, where P spans M Q."""
    momentum = make_momentum(2)
    q = momentum.right_factors()["dion_rank_2.b"].double().t()
    gradient = drawn(1)
    momentum.reduce_(gradient.clone(), alone(), 0)
    m = gradient[240:].view(20, 12).double()
    p, _ = torch.linalg.qr(m @ q)
    left = momentum.state()["momentum"][240:].view(20, 12)
    torch.testing.assert_close(left.double(), m - 0.1 * p @ p.t() @ m, rtol=1e-5, atol=1e-6)


def test_gradients_of_low_rank_and_none_leave_directions_as_they_are() -> None:
    momentum = make_momentum(3)
    start = {name: factor.clone() for name, factor in momentum.right_factors().items()}
    update = torch.zeros(480)
    momentum.reduce_(update, alone(), 0)
    assert not update.any()
    assert all(torch.equal(factor, start[name]) for name, factor in momentum.right_factors().items())
    one = torch.outer(drawn(1)[:12], drawn(2)[:20])
    update[:240] = one.flatten()
    momentum.reduce_(update, alone(), 1)
    assert (update[:240].view(12, 20) - one / one.norm()).norm() < 1e-5
    changed = momentum.right_factors()["dion_rank_3.a"]
    assert torch.equal(changed[1:], start["dion_rank_3.a"][1:]) and not torch.equal(
        changed[0], start["dion_rank_3.a"][0]
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_makes_all_updates_nan(rank: int, number: float) -> None:
    def body(comm: Communicator) -> Tensor:
        gradients = drawn(comm.rank)
        if comm.rank == rank:
            gradients[300] = number
        make_momentum(3).reduce_(gradients, Exchange(comm, None, []), 0)
        return gradients

    assert all(update.isnan().all() for update in on_threads(2, body))
