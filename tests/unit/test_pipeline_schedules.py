"""Schedules of pipelines: whole, free of deadlock, and with the bubbles and memory that their papers give."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from hvdlm.config.parallel import Schedule as ScheduleName
from hvdlm.parallel.pipeline.schedules import Kind, Operation, Schedule, arrivals, forward_only, make_schedule
from hvdlm.parallel.pipeline.simulation import PassSeconds, most_in_flight, simulate

RANKS = [1, 2, 3, 4, 8]
MICRO_BATCHES = [1, 2, 3, 4, 7, 8, 16]
SECONDS = PassSeconds(forward=1.0, input_gradient=1.2, weight_gradient=0.8)


def text(schedule: Schedule) -> list[str]:
    """F1, B1, I1 and W1 are the passes of the second micro-batch; of chunk 1, with a dash."""
    letters = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.INPUT_GRADIENT: "I", Kind.WEIGHT_GRADIENT: "W"}
    return [
        " ".join(f"{letters[each.kind]}{each.micro_batch}{'-' * each.chunk}" for each in operations)
        for operations in schedule
    ]


def test_as_the_papers_draw_them() -> None:
    assert text(make_schedule("gpipe", 2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2
    assert text(make_schedule("1f1b", 3, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    # Narayanan et al. 2021, figure 4, below, of half as many ranks and micro-batches
    assert text(make_schedule("interleaved", 2, 4, 2)) == [
        "F0 F1 F0- F1- F2 B0- F3 B1- F2- B0 F3- B1 B2- B3- B2 B3",
        "F0 F1 F0- B0- F1- B1- F2 B0 F3 B1 F2- B2- F3- B3- B2 B3",
    ]
    # Qi et al. 2024, figure 2, of half as many ranks
    assert text(make_schedule("zero_bubble", 2, 4)) == [
        "F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3",
        "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3",
    ]
    # Zhuang et al. 2023: 2 (p - 1 - r) forward passes before
    assert text(make_schedule("eager_1f1b", 2, 4)) == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert text(make_schedule("zero_bubble_h2", 2, 4)) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]
    assert text(forward_only(2, 3, 2)) == ["F0 F1 F0- F1- F2 F2-"] * 2


@pytest.mark.parametrize("name", get_args(ScheduleName))
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("micro_batches", [0, *MICRO_BATCHES])
def test_every_pass_is_made_once_and_none_waits_for_ever(name: str, ranks: int, micro_batches: int) -> None:
    for chunks in [2, 3] if name == "interleaved" else [1]:
        schedule = make_schedule(name, ranks, micro_batches, chunks)
        kinds = [Kind.FORWARD, Kind.BACKWARD]
        if name.startswith("zero_bubble"):
            kinds = [Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]
        every = {
            Operation(kind, each, chunk) for kind in kinds for each in range(micro_batches) for chunk in range(chunks)
        }
        assert len(schedule) == ranks
        for operations in schedule:
            assert Counter(operations) == Counter(every)
        simulate(schedule, SECONDS, chunks)
        sent = sum(len(each) for rank in range(ranks) for each in arrivals(schedule, rank, chunks).values())
        assert sent == 2 * micro_batches * (ranks * chunks - 1)


def test_ranks_that_wait_for_each_other_are_found() -> None:
    first, second = make_schedule("1f1b", 2, 2)
    reversed_first = [first[-1], *first[:-1]]
    with pytest.raises(ValueError, match="rank 0 waits for ever before backward of micro-batch 1 on chunk 0"):
        simulate([reversed_first, second], SECONDS)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_bubbles_are_those_of_the_papers(ranks: int, micro_batches: int) -> None:
    """Huang et al. 2019, section 2.3; Narayanan et al. 2021, sections 2.2.1 and 2.2.2; Qi et al. 2024, table 2."""
    shared = (ranks - 1) / (micro_batches + ranks - 1)
    for name in ("gpipe", "1f1b", "eager_1f1b"):
        assert simulate(make_schedule(name, ranks, micro_batches), SECONDS).bubble == pytest.approx(shared)
    if micro_batches % ranks == 0:
        for chunks in (2, 3):
            bubble = simulate(make_schedule("interleaved", ranks, micro_batches, chunks), SECONDS, chunks).bubble
            assert bubble == pytest.approx((ranks - 1) / (chunks * micro_batches + ranks - 1))
    if micro_batches >= ranks:
        seconds = simulate(make_schedule("zero_bubble", ranks, micro_batches), SECONDS).seconds
        assert seconds == pytest.approx(micro_batches * (1 + 1.2 + 0.8) + (ranks - 1) * (1 + 1.2 - 0.8))
    if micro_batches >= 2 * ranks:  # nothing but the last rank's late beginning
        seconds = simulate(make_schedule("zero_bubble_h2", ranks, micro_batches), SECONDS).seconds
        assert seconds == pytest.approx(micro_batches * (1 + 1.2 + 0.8) + (ranks - 1) * 1)


def test_a_message_delays_the_ranks_after() -> None:
    """Of 2 ranks and one micro-batch: forward, message, forward, backward, message, backward."""
    seconds = PassSeconds(forward=1, input_gradient=2, weight_gradient=1, message=0.5)
    assert simulate(make_schedule("1f1b", 2, 1), seconds).seconds == pytest.approx(1 + 0.5 + 1 + 3 + 0.5 + 3)
    assert simulate(make_schedule("zero_bubble", 2, 1), seconds).seconds == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 3)


def test_eager_schedules_wait_for_messages_at_the_ends_alone() -> None:
    """Of 2 ranks and 8 micro-batches; 1F1B waits for one message with each micro-batch, and for one more."""
    seconds = PassSeconds(forward=1, input_gradient=1.2, weight_gradient=0.8, message=0.25)

    def waited(name: str) -> float:
        return simulate(make_schedule(name, 2, 8), seconds).seconds - 8 * 3

    assert waited("1f1b") == pytest.approx(3 + 8 * 0.25)
    assert waited("eager_1f1b") == pytest.approx(3 + 2 * 0.25)
    assert waited("zero_bubble_h2") == pytest.approx(1 + 0.25)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("micro_batches", [8, 16])
def test_activations_in_flight_are_those_of_the_papers(ranks: int, micro_batches: int) -> None:
    def most(name: str, chunks: int = 1) -> list[int]:
        return most_in_flight(make_schedule(name, ranks, micro_batches, chunks))

    assert most("gpipe") == [micro_batches] * ranks
    assert most("1f1b") == [ranks - rank for rank in range(ranks)]
    assert most("eager_1f1b") == [min(2 * (ranks - rank) - 1, micro_batches) for rank in range(ranks)]
    assert most("zero_bubble") == [ranks] * ranks  # Qi et al. 2024, table 2: the most that 1F1B needs
    assert most("zero_bubble_h2") == [min(2 * ranks - 1, micro_batches)] * ranks
    if micro_batches % ranks == 0:  # Narayanan et al. 2021, section 2.2.2: ranks + (ranks - 1) / chunks micro-batches
        assert most("interleaved", 2)[0] == min(2 * ranks + ranks - 1, 2 * micro_batches)
