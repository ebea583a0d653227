"""Rounds, fragments and the outer optimizer of local steps, by hand and against PyTorch's SGD."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import LocalStepsSection
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.strategies.local_steps.fragment import DifferenceBucket
from hvdlm.strategies.local_steps.groups import make_groups
from hvdlm.strategies.local_steps.interval import choose
from hvdlm.strategies.local_steps.outer_optimizer import OuterOptimizer
from hvdlm.strategies.local_steps.pace import Pace
from hvdlm.strategies.local_steps.rounds import Rounds, split_into_fragments


def schedule(rounds: Rounds, steps: int) -> dict[int, tuple[list[int], list[int]]]:
    """Fragments whose rounds begin and end, by step, where there are any."""
    found = {step: (rounds.beginning(step), rounds.ending(step)) for step in range(steps + 1)}
    return {step: both for step, both in found.items() if any(both)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every": 3}, {3: ([0], [0]), 6: ([0], [0]), 9: ([0], [0])}),
        ({"every": 4, "warmup_steps": 3}, {7: ([0], [0])}),
        ({"every": 4, "fragments": 2}, {2: ([0], [0]), 4: ([1], [1]), 6: ([0], [0]), 8: ([1], [1])}),
        ({"every": 4, "overlap": 1}, {3: ([0], []), 4: ([], [0]), 7: ([0], []), 8: ([], [0])}),
        (
            {"every": 4, "fragments": 2, "overlap": 2},  # the first end of fragment 1 would be that of no local step
            {2: ([1], []), 4: ([0], [1]), 6: ([1], [0]), 8: ([0], [1])},
        ),
        ({"every": 2, "fragments": 4}, {1: ([1, 2], [1, 2]), 2: ([0, 3], [0, 3]), 3: ([1, 2], [1, 2])}),
        ({"every": 1, "overlap": 1}, {1: ([0], []), 2: ([0], [0]), 3: ([0], [0])}),
    ],
)
def test_rounds(settings, expected):
    found = schedule(Rounds(**{"fragments": 1, "overlap": 0, "warmup_steps": 0, **settings}), 10)
    assert {step: found[step] for step in expected} == expected
    assert all(step in expected for step in found if step < max(expected))


def test_fragments_are_consecutive_and_alike():
    sizes = {"a": 10, "b": 30, "c": 10, "d": 20, "e": 10}
    parameters = {name: nn.Parameter(torch.empty(size)) for name, size in sizes.items()}
    # Middles at 5, 25, 45, 60, 75 of 80
    assert [list(each) for each in split_into_fragments(parameters, 2)] == [["a", "b"], ["c", "d", "e"]]
    assert [list(each) for each in split_into_fragments(parameters, 4)] == [["a"], ["b"], ["c"], ["d", "e"]]
    parameters["b"].requires_grad_(False)
    assert [list(each) for each in split_into_fragments(parameters, 1)] == [["a", "c", "d", "e"]]


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.7, 0.9), (0.8, 0.4)])
def test_the_outer_optimizer_is_sgd_on_the_negative_difference(lr, momentum):
    torch.manual_seed(0)
    outer = torch.randn(50)
    theirs = nn.Parameter(outer.clone())
    sgd = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=momentum > 0)
    ours, velocity = OuterOptimizer(lr, momentum), torch.zeros(50) if momentum else None
    for _ in range(6):
        difference = torch.randn(50)
        theirs.grad = -difference
        sgd.step()
        ours.step_(outer, velocity, difference)
        torch.testing.assert_close(outer, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("merge", [{"merge": "add"}, {"merge": "mix", "alpha": 0.3}, {"merge": "mix", "alpha": 0.0}])
@pytest.mark.parametrize("has_overlapped", [False, True])
def test_the_end_of_a_round_by_loops_and_by_torch_operations(momentum, merge, has_overlapped):
    settings = LocalStepsSection(every=4, overlap=1, momentum=momentum, lr=0.7, **merge)
    ends = []
    for way in ("_end_by_loops_", "_end_with_torch_"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.LayerNorm(6)})
        bucket = DifferenceBucket(dict(model.named_parameters()), settings, is_elastic=False)
        bucket.set_outer_()
        outcome = []
        for _ in range(2):
            for parameter in model.parameters():  # local steps, before and after the round begins
                parameter.data.add_(torch.randn_like(parameter))
            bucket.take_differences_()
            for parameter in model.parameters():
                parameter.data.add_(has_overlapped * torch.randn_like(parameter))
            sent = bucket.sent if has_overlapped and merge["merge"] == "add" else None
            getattr(bucket, way)(OuterOptimizer(0.7, momentum), 0.5, sent)
            outcome += [bucket.outer.clone(), *(each.clone() for each in bucket.local())]
        ends.append(outcome)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("compute", "round_", "fragments", "expected"),
    [
        (0.29, 0.47, 2, (2, 1)),  # 0.47 / (0.9 x 0.29) is 1.8
        (0.29, 4.7, 4, (19, 5)),  # 18.01
        (0.29, 0.047, 2, (1, 1)),
        (0.1, 0.9, 3, (10, 4)),
    ],
)
def test_as_few_steps_as_hide_a_round(compute, round_, fragments, expected):
    groups = make_groups(SoloCommunicator(), [], torch.device("cpu"), load(None, [], PRESETS), 1)
    chosen, sentence = choose(Rounds(1, fragments, 1, 8), groups, compute, round_)
    assert (chosen.every, chosen.overlap) == expected
    assert (chosen.fragments, chosen.warmup_steps) == (fragments, 8)
    assert f"local_steps.every = {expected[0]}, local_steps.overlap = {expected[1]}" in sentence


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--local_steps.every", "4", "--local_steps.overlap", "5"], "overlap = 5 is more than local_steps.every = 4"),
        (["--local_steps.every", "4", "--compression.codec", "auto"], "codec = 'auto' chooses .* of every step"),
        (["--local_steps.every", "-1"], "local_steps.every"),
        (["--local_steps.every", "often"], "local_steps.every"),
        (["--local_steps.every", "auto", "--local_steps.overlap", "2"], "every = 'auto' chooses local_steps.overlap"),
        (["--local_steps.momentum", "1.0"], "local_steps.momentum"),
    ],
)
def test_bad_settings_are_one_sentence(words, message):
    with pytest.raises(HvdlmError, match=message):
        load(None, words, PRESETS)


# ---- groups that are not as fast as others


def told(pace: Pace, *microseconds: int) -> list[bool]:
    """Ten steps after all groups have told what a step takes."""
    pace.hear(torch.tensor(microseconds))
    return [pace.takes_part() for _ in range(10)]


@pytest.mark.parametrize(
    ("microseconds", "steps"),
    [
        ((100, 200), [2, 4, 6, 8, 10]),
        ((100, 250), [3, 5, 8, 10]),  # 0.4 of a step is due each time: 1.2, 1.0 after 5, ...
        ((100, 105), list(range(1, 11))),  # as fast as the other, but for noise
        ((200, 100), list(range(1, 11))),
        ((0, 300), list(range(1, 11))),  # the other has told nothing
    ],
)
def test_a_slow_group_leaves_out_steps(microseconds, steps):
    taken = told(Pace(1, 2), *microseconds)
    assert [number for number, takes_part in enumerate(taken, start=1) if takes_part] == steps


def test_every_rank_knows_which_groups_take_part():
    """Also after it has been stopped and goes on."""
    first, second = Pace(0, 2), Pace(1, 2)
    assert told(first, 100, 400).count(True) == 10
    assert told(second, 100, 400).count(True) == 2
    assert first.state_dict() == second.state_dict()
    assert first.share_left_out() == 8 / 20
    resumed = Pace(1, 2)
    resumed.load_state_dict(second.state_dict())
    assert [resumed.takes_part() for _ in range(3)] == [second.takes_part() for _ in range(3)] == [False, True, False]


def test_what_a_group_tells():
    pace = Pace(1, 3)
    assert pace.tell(is_leader=True).tolist() == [0, 0, 0]
    for seconds in (0.5, 0.002, 0.001, 0.003, 0.002, 0.002, 0.002, 0.002, 0.002):  # the last eight count
        pace.add(seconds)
    assert pace.tell(is_leader=True).tolist() == [0, 2000, 0]
    assert pace.tell(is_leader=False).tolist() == [0, 0, 0]
