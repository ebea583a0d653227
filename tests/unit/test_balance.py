"""When shares of a batch change: on ranks that are played by functions of time, with the noise of real ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.rank_parts import RankParts
from hvdlm.strategies.strategy import Pace
from hvdlm.training.balance import Balance, mean_pace, pace_of

EVERY = 8


class Rank:
    """A trainer, as far as `Balance` knows one."""

    def __init__(self, batch: int, ranks: int, algorithm: str = "adamw") -> None:
        self.step, self.parts = 0, RankParts(BatchSizes(batch), ranks)
        self.communicator = SimpleNamespace(hosts=[f"n{rank}" for rank in range(ranks)])
        self.config = SimpleNamespace(
            train=SimpleNamespace(balance_every=EVERY),
            optimizer=SimpleNamespace(algorithm=algorithm),
            model=SimpleNamespace(context_length=100),
        )
        self.events: list[dict[str, Any]] = []
        self.balance = Balance(self)  # type: ignore[arg-type]

    def write(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, "step": self.step, **values})

    def open_loader(self) -> Any:
        return SimpleNamespace(close=lambda: None)


def train(
    seconds: Callable[[int], Sequence[float]], steps: int, batch: int = 16, noise: float = 0.0, algorithm: str = "adamw"
) -> list[Rank]:
    """Ranks that need `seconds(step)[rank]` for a sequence, times a number near 1; one step of 50 takes three times."""
    draw = random.Random(1)
    ranks = [Rank(batch, len(seconds(0)), algorithm) for _ in seconds(0)]
    for step in range(steps):
        paces = [each.balance.pace() for each in ranks]
        told = tuple(pace for pace in paces if pace is not None)
        assert len(told) in (0, len(ranks))
        for number, each in enumerate(ranks):
            share = each.parts.shares(step)[number]
            length = share * seconds(step)[number] * math.exp(draw.gauss(0, noise)) * (3 if draw.random() < 0.02 else 1)
            phases = {"data": 0.1 * length, "forward": 0.3 * length, "backward": 0.6 * length, "wait": 9.0}
            if algorithm == "muon":
                phases["optimizer"] = 9.0 - number
            each.balance.add(SimpleNamespace(seconds=lambda phases=phases: phases), share, told)  # type: ignore[arg-type]
            each.step = step + 1
            each.balance.deal_out(each.open_loader())
        assert len({each.parts.shares(step + 1) for each in ranks}) == 1
    return ranks


def changes(ranks: Sequence[Rank]) -> list[tuple[int, tuple[int, ...]]]:
    """After which step ranks had which shares."""
    return [(event["step"], event["shares"]) for event in ranks[0].events]


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("batch", [16, 512])
def test_equal_ranks_keep_equal_shares(batch: int, noise: float) -> None:
    assert changes(train(lambda _: (1.0, 1.0), 3000, batch, noise)) == []


@pytest.mark.parametrize(("slowness", "shares"), [(2.0, (11, 5)), (4.0, (13, 3))])
@pytest.mark.parametrize("when", range(40, 48))
def test_a_change_of_speed_is_followed_within_20_steps(slowness: float, shares: tuple[int, ...], when: int) -> None:
    done = changes(train(lambda step: (1.0, slowness if step >= when else 1.0), 80, noise=0.03))
    assert done[-1][1] == shares
    assert all(when < step <= when + 20 for step, _ in done)


def test_and_back() -> None:
    done = changes(train(lambda step: (1.0, 4.0 if step < 50 else 1.0), 100, noise=0.03))
    assert (done[0][1], done[-1][1]) == ((13, 3), (8, 8))


def test_what_is_told() -> None:
    (event,) = train(lambda _: (1.0, 1.0, 2.0), 20)[0].events
    assert event["kind"] == "event" and event["step"] == 9
    # Of 16 sequences 6, 7 and 3 take 7 s; 5, 5 and 6 take 12
    assert event["message"] == (
        "rank 2 on n2, the slowest, takes 2.00 times as long for a token as the others: of a batch ranks have 7, 6 "
        "and 3 sequences from now on, not 5, 5 and 6, for 42% less time"
    )
    assert (event["old_shares"], event["shares"]) == ((5, 5, 6), (7, 6, 3))
    assert event["nanoseconds_a_token"] == pytest.approx([1e7, 1e7, 2e7])


def test_many_shares_are_not_written_out() -> None:
    (event,) = train(lambda _: (1.0,) * 11 + (3.0,), 20, batch=120)[0].events
    assert sum(event["shares"]) == 120 and set(event["shares"][:11]) == {10, 11}
    assert f"ranks have {event['shares'][11]} to 11 sequences from now on, not 10 to 10, for " in event["message"]


def test_waiting_in_muon_s_update_is_no_computing() -> None:
    assert changes(train(lambda _: (1.0, 1.0), 40, algorithm="muon")) == []
    assert changes(train(lambda _: (1.0, 2.0), 40, algorithm="muon")) == [(9, (11, 5))]


def test_nothing_is_told_of_a_rank_without_sequences() -> None:
    """Three ranks and two sequences: they are never shared by cost."""
    assert changes(train(lambda _: (1.0, 5.0, 1.0), 40, batch=2)) == []


def test_measuring_begins_anew() -> None:
    ranks = train(lambda _: (1.0, 1.0), EVERY)
    assert all(each.balance.pace() == Pace(10_000_000_000, 0) for each in ranks)  # 1 s for 100 tokens
    for each in ranks:
        each.balance.begin()
    assert all(each.balance.pace() == Pace(0, 0) for each in ranks)


def test_a_pace_by_hand() -> None:
    """Without 1 and 90 the mean of 2, 3, 3, 4 is 3. Of 2, 2, 3, 3, 4, 4 the variance is 4/5: sqrt(4/5 x 6) / 4."""
    assert pace_of([3.0, 90.0, 2.0, 4.0, 1.0, 3.0]) == Pace(3 * 10**12, round(math.sqrt(4.8) / 4 * 1e12))
    assert mean_pace([Pace(10, 3), Pace(20, 4)]) == Pace(15, 2)  # hypot(3, 4) / 2, the even one of two
