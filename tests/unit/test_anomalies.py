"""Losses that stand out, ranks that are slow, steps that a kernel leaves out: told at the right moment."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from hvdlm.config import OptimizerSection
from hvdlm.strategies.optimizer import leave_out_if, make_optimizer
from hvdlm.training.loss_spikes import LossSpikes
from hvdlm.training.stragglers import Stragglers


def test_a_spike_is_told_with_its_height_and_forgotten() -> None:
    spikes = LossSpikes()
    values = [3.0 + 0.1 * (-1) ** index for index in range(20)]  # mean 3, standard deviation 0.1 sqrt(20 / 19)
    assert [spikes.add(loss) for loss in values] == [None] * 20
    deviation = 0.1 * math.sqrt(20 / 19)
    for _ in range(2):  # the first does not raise the mean for the second
        assert spikes.add(4.0) == pytest.approx(1 / deviation)
    assert spikes.add(3.0 + 5.9 * deviation) is None


def test_a_loss_that_falls_as_at_a_run_s_beginning_has_no_spikes() -> None:
    generator, spikes = random.Random(0), LossSpikes()
    losses = [3 + 6 * math.exp(-step / 30) + generator.gauss(0, 0.05) for step in range(1000)]
    assert [spikes.add(loss) for loss in losses] == [None] * 1000
    assert spikes.add(math.nan) is None
    assert spikes.add(math.inf) is None


def test_a_straggler_is_told_once_when_it_is_slow_for_the_third_time() -> None:
    stragglers = Stragglers()
    assert stragglers.add([1.0, 1.0, 2.0]) is None
    assert stragglers.add([1.0, 1.0, 1.0]) is None
    for expected in (None, None, (2, pytest.approx(2.0)), None, None):
        assert stragglers.add([1.0, 1.0, 2.0]) == expected
    for expected in (None, None, (0, pytest.approx(4.0))):
        assert stragglers.add([4.0, 1.0, 1.0]) == expected
    assert stragglers.add([1.0, 4.0]) is None  # other ranks


def test_short_times_are_added_up_before_they_are_compared() -> None:
    stragglers = Stragglers()
    told = [stragglers.add([0.125, 0.25]) for _ in range(16)]  # a comparison each fourth time
    assert told == [None] * 11 + [(1, pytest.approx(2.0))] + [None] * 4


@pytest.mark.parametrize("seconds", [[1.0], [1.0, 1.4], [0.0, 0.1], [0.0, 0.0]])
def test_no_straggler(seconds: list[float]) -> None:
    stragglers = Stragglers()
    assert [stragglers.add(seconds) for _ in range(9)] == [None] * 9


@pytest.mark.parametrize("algorithm", ["adamw", "adam", "sgd"])
def test_the_fused_kernel_leaves_out_a_step(algorithm: str) -> None:
    """As on a GPU, whose host does not wait for the norm: parameters, moments and count of steps stay."""
    torch.manual_seed(0)
    settings = OptimizerSection.model_validate({"lr": 0.1, "algorithm": algorithm})
    model, twin = nn.Linear(7, 3), nn.Linear(7, 3)
    twin.load_state_dict(model.state_dict())
    optimizer, other = (make_optimizer(each, settings) for each in (model, twin))
    for step in range(5):
        found = torch.tensor(step in (1, 3))
        gradient = torch.full((3, 7), math.nan) if found else torch.randn(3, 7)
        model.weight.grad, model.bias.grad = gradient, gradient.sum(1)
        assert leave_out_if(optimizer, found)
        optimizer.step()
        if not found:
            assert leave_out_if(other, found)
            twin.weight.grad, twin.bias.grad = gradient.clone(), gradient.sum(1)
            other.step()
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, expected)
        assert optimizer.state[mine]
        for name, tensor in optimizer.state[mine].items():
            assert torch.equal(tensor, other.state[expected][name])


@pytest.mark.parametrize("settings", [{"freeze_variance_after": 1}, {"algorithm": "lion"}])
def test_other_kernels_do_not_leave_out_a_step(settings: dict[str, object]) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), OptimizerSection.model_validate(settings))
    assert not leave_out_if(optimizer, torch.tensor(True))
