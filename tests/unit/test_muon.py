"""Muon against torch.optim.Muon, how matrices are dealt out, and its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.work import Work
from hvdlm.config import ModelSection, OptimizerSection
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.hidden_matrices import hidden_matrices
from hvdlm.strategies.muon.newton_schulz import flops, orthogonalise
from hvdlm.strategies.muon.optimizer import MuonAdamW
from hvdlm.strategies.muon.shares import deal_out, in_rounds
from hvdlm.strategies.optimizer import leave_out_if, make_optimizer, optimizer_tensors, set_learning_rate

SETTINGS = OptimizerSection(algorithm="muon", lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
RATES = [0.02, 0.01, 0.005, 0.03]


def make_model() -> Transformer:
    """Its blocks have matrices of 48 x 16, 16 x 16, 64 x 16 and 16 x 64."""
    model = Transformer(ModelSection(layers=2, width=16, heads=2, context_length=8), vocab_size=11)
    model.initialise(1)
    return model


def set_gradients(model: Transformer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("adjustment", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(("ratio", "momentum"), [(1.0, 0.95), (5.0, 0.8)])
@pytest.mark.parametrize(("uses_loops", "tolerance"), [(False, 1e-6), (True, 1e-3)])
def test_steps_are_pytorch_s(
    adjustment: Any, ratio: float, momentum: float, uses_loops: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.optim.Muon for matrices of blocks, torch.optim.AdamW for the rest, of which only matrices decay.

    By loops for the CPU a momentum may differ in its last bit, and so what is orthogonalised in bfloat16's.
    """
    monkeypatch.setattr("hvdlm.strategies.update_loops.uses_loops", lambda _: uses_loops)
    changed = {"muon_adjustment": adjustment, "muon_lr_ratio": ratio, "muon_momentum": momentum}
    model, plain = make_model(), make_model()
    optimizer = make_optimizer(model, SETTINGS.model_copy(update=changed))
    theirs = dict(plain.named_parameters())
    matrices = [each for name, each in theirs.items() if name.startswith("blocks.") and each.dim() == 2]
    others = [each for name, each in theirs.items() if not (name.startswith("blocks.") and each.dim() == 2)]
    muon = torch.optim.Muon(matrices, weight_decay=0.3, momentum=momentum, adjust_lr_fn=adjustment)
    adamw = torch.optim.AdamW(
        [
            {"params": [each for each in others if each.dim() >= 2], "weight_decay": 0.3},
            {"params": [each for each in others if each.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    for step, rate in enumerate(RATES):
        set_gradients(model, step)
        set_gradients(plain, step)
        set_learning_rate(optimizer, rate)
        set_learning_rate(muon, ratio * rate)
        set_learning_rate(adamw, rate)
        for each in (optimizer, muon, adamw):
            each.step()
        for name, parameter in parameters(model).items():
            torch.testing.assert_close(parameter, theirs[name].detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(40, 40), (40, 120), (120, 40), (7, 1), (1, 7)])
def test_singular_values_become_about_1(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    kept = matrix.clone()
    result = orthogonalise(matrix)
    assert result.dtype == torch.bfloat16 and result.shape == shape and torch.equal(matrix, kept)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.t() @ result.float() @ vt.t()  # diagonal, as singular vectors stay
    large = s > 0.1 * s.max()
    assert ((found.diag()[large] > 0.5) & (found.diag()[large] < 1.4)).all()
    assert (found - found.diag().diag()).abs().max() < 0.05


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalise(torch.zeros(4, 6)).any()


def test_arithmetic_by_hand() -> None:
    """5 times X X^T, its square and a product with X, a multiplication and an addition each."""
    assert flops(3, 10) == flops(10, 3) == 5 * 2 * (3 * 3 * 10 + 3 * 3 * 3 + 3 * 3 * 10)


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [
        ([5, 5, 5, 5], 2, [[0, 2], [1, 3]]),
        ([1, 9, 4, 4], 2, [[1], [2, 3, 0]]),
        ([3, 2], 4, [[0], [1], [], []]),
        ([], 2, [[], []]),
    ],
)
def test_dealt_out_by_hand(costs: list[int], ranks: int, expected: list[list[int]]) -> None:
    assert deal_out(costs, ranks) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 64])
def test_every_matrix_has_one_owner_and_loads_are_even(ranks: int) -> None:
    costs = [flops(*shape) for _ in range(12) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]
    shares = deal_out(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(48))
    loads = [sum(costs[index] for index in share) for share in shares]
    best = max(sum(costs) / ranks, max(costs))
    assert max(loads) <= 4 / 3 * best


def test_rounds_by_hand() -> None:
    sizes = [10, 20, 30, 40, 50]
    shares = [[0, 3], [1], [2, 4]]
    assert in_rounds(shares, sizes, 60) == [[[0], [1], [2]], [[3], [], [4]]]
    assert in_rounds(shares, sizes, 61) == [[[0, 3], [1], [2, 4]]]
    assert in_rounds(shares, sizes, 1) == [[[0], [1], [2]], [[3], [], [4]]]
    assert in_rounds([[], []], [], 1) == []


class Telling:
    """Rank 1 of two, whose messages `told` keeps."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def all_gather_v_async(self, tensor: Tensor, lengths: Sequence[int]) -> Work[list[Tensor]]:
        self.told.append(tensor)
        return Work.done([torch.zeros(lengths[0], dtype=torch.bfloat16), tensor])


class Bereaved:
    """Rank 0 of these two; the other dies when it has sent the messages `told`."""

    rank, size = 0, 2

    def __init__(self, told: list[Tensor]) -> None:
        self.told = told
        self.has_died = False

    def all_gather_v_async(self, tensor: Tensor, lengths: Sequence[int]) -> Work[list[Tensor]]:
        if self.told:
            assert lengths[1] == len(self.told[0])
            return Work.done([tensor, self.told.pop(0)])
        return Work(self._die)

    def _die(self) -> list[Tensor]:
        self.has_died = True
        raise DeadRankError("for the test")


@pytest.mark.parametrize("messages", [0, 1, 3])
def test_who_has_lost_a_rank_completes_the_step_alone(messages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.strategies.muon.shares._ROUND_BYTES", 1)
    models = [make_model() for _ in range(3)]
    alone, other, bereaved = (make_optimizer(model, SETTINGS) for model in models)
    for model in models:
        set_gradients(model, 0)
    alone.step()
    telling = Telling()
    assert isinstance(other, MuonAdamW) and isinstance(bereaved, MuonAdamW)
    other.deal_out_among(cast(Communicator, telling))
    other.step()
    assert len(telling.told) == 4
    lost = Bereaved(telling.told[:messages])
    bereaved.deal_out_among(cast(Communicator, lost))
    bereaved.step()
    assert lost.has_died
    for name, parameter in parameters(models[2]).items():
        assert torch.equal(parameter, parameters(models[0])[name]), name


def test_state_and_kernels() -> None:
    model = make_model()
    optimizer = make_optimizer(model, SETTINGS)
    tensors = optimizer_tensors(optimizer, model)
    matrices = hidden_matrices(model)
    assert len(matrices) == 8
    assert {name for name in tensors if name.startswith("muon_momentum.")} == {f"muon_momentum.{n}" for n in matrices}
    assert not any(f"exp_avg.{name}" in tensors for name in matrices)
    assert {f"{kind}.token_embedding.weight" for kind in ("step", "exp_avg", "exp_avg_sq")} <= tensors.keys()
    assert not leave_out_if(optimizer, torch.tensor(True))  # only a part of the step is by the fused kernel


def test_second_moments_of_the_rest_may_be_frozen() -> None:
    model = make_model()
    optimizer = make_optimizer(model, SETTINGS.model_copy(update={"freeze_variance_after": 1}))
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
        if step == 0:
            second = optimizer_tensors(optimizer, model)["exp_avg_sq.token_embedding.weight"].clone()
    assert torch.equal(second, optimizer_tensors(optimizer, model)["exp_avg_sq.token_embedding.weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.muon_momentum", "1.0"], "optimizer.muon_momentum"),
        (["--optimizer.muon_lr_ratio", "0"], "optimizer.muon_lr_ratio"),
        (["--optimizer.muon_adjustment", "none"], "optimizer.muon_adjustment"),
    ],
)
def test_bad_settings_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(HvdlmError, match=message) as error:
        load(None, ["--optimizer.algorithm", "muon", *words], PRESETS)
    assert "\n" not in str(error.value)


def test_the_size_of_an_update_is_adamw_s() -> None:
    """Of match_rms_adamw: a root mean square of about 0.2 for any shape (Liu et al., arXiv:2502.16982)."""
    for shape in ((64, 64), (64, 192), (256, 64)):
        result = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(5))).float()
        assert 0.2 * math.sqrt(max(shape)) * result.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
