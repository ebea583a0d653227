"""The parts of benchmarks/recovery.py that start no job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from recovery.recovery_table import table, worst_loss_difference
from recovery.step_lines import LoggedStep, MetricsLines, RankLines
from recovery.trial import Plan, make_plan

RANKS, BATCH = 4, 16


def log(run_dir: Path, rank: int, step: int, loss: float, own: int, samples: int, ranks: int) -> None:
    record = {"step": step, "loss": loss, "own_samples": own, "samples": samples, "ranks": ranks}
    with (run_dir / f"rank{rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(run_dir: Path) -> RankLines:
    lines = RankLines(run_dir, RANKS)
    lines.read()
    return lines


def test_the_loss_of_a_step_is_the_mean_over_samples(tmp_path: Path) -> None:
    for rank, own in enumerate((6, 5, 5)):
        log(tmp_path, rank, 1, loss=float(rank), own=own, samples=BATCH, ranks=3)
    assert read(tmp_path).steps() == {1: LoggedStep((0 * 6 + 1 * 5 + 2 * 5) / 16, BATCH)}


def test_a_step_that_the_dead_rank_has_not_logged_has_its_samples_but_no_loss(tmp_path: Path) -> None:
    for rank in range(RANKS - 1):
        log(tmp_path, rank, 1, loss=2.0, own=4, samples=BATCH, ranks=RANKS)
    lines = read(tmp_path)
    assert lines.steps() == {1: LoggedStep(None, BATCH)}
    assert lines.since_death is None


def test_a_batch_that_shrinks_by_the_dead_rank_s_part(tmp_path: Path) -> None:
    for rank in range(RANKS):
        log(tmp_path, rank, 1, loss=2.0, own=4, samples=16, ranks=4)
    lines = read(tmp_path)
    assert lines.since_death is None
    for rank in range(RANKS - 1):
        log(tmp_path, rank, 2, loss=2.0, own=4, samples=12, ranks=3)
    lines.read()
    assert lines.since_death == lines.times[2] > lines.times[1]
    assert [step.samples for step in lines.steps().values()] == [16, 12]
    assert lines.repeated == {}


def test_a_rank_that_recovers_adds_no_samples(tmp_path: Path) -> None:
    log(tmp_path, 0, 1, loss=2.0, own=4, samples=8, ranks=2)
    log(tmp_path, 1, 1, loss=4.0, own=4, samples=8, ranks=2)
    log(tmp_path, 2, 1, loss=9.0, own=0, samples=8, ranks=2)
    assert read(tmp_path).steps() == {1: LoggedStep(3.0, 8)}


def test_a_step_that_is_made_again_is_repeated_and_ends_no_recovery(tmp_path: Path) -> None:
    log(tmp_path, 1, 1, loss=9.0, own=4, samples=BATCH, ranks=4)  # rank 0, whose state counts, had not come so far
    lines = read(tmp_path)
    for step in (1, 2):
        for rank, own in enumerate((6, 5, 5)):
            log(tmp_path, rank, step, loss=2.0, own=own, samples=BATCH, ranks=3)
        lines.read()
        assert (lines.since_death is None) == (step == 1)
    assert lines.repeated == {1: BATCH}
    assert lines.steps() == {1: LoggedStep(2.0, BATCH), 2: LoggedStep(2.0, BATCH)}


def test_half_a_line_waits_for_the_other_half(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    log(tmp_path, 0, 1, loss=2.0, own=4, samples=BATCH, ranks=4)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    lines = read(tmp_path)
    with path.open("ab") as file:
        file.write(whole[20:].replace(b'"loss": 2.0', b'"loss": 3.0'))
    lines.read()
    assert lines.last == 1


def metrics(run_dir: Path, *records: dict[str, Any]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")


def train(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.0 / step}


def test_the_event_of_a_death_in_metrics(tmp_path: Path) -> None:
    metrics(tmp_path, train(1))
    lines = MetricsLines(tmp_path, BATCH)
    lines.read()
    assert lines.since_death is None
    metrics(tmp_path, train(1), {"kind": "event", "message": "rank 2 died: 3 go on"}, train(2))
    lines.read()
    assert lines.since_death == lines.times[2]
    assert lines.steps() == {1: LoggedStep(1.0, BATCH), 2: LoggedStep(0.5, BATCH)}


def test_steps_since_the_newest_checkpoint_are_repeated(tmp_path: Path) -> None:
    for step in (2, 4, 20):  # the last one is of a later time
        (tmp_path / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
    metrics(tmp_path, *map(train, range(1, 7)))
    lines = MetricsLines(tmp_path, BATCH)
    lines.read()
    lines.begin_again()
    assert lines.repeated == {5: BATCH, 6: BATCH}


def test_a_plan_is_drawn_by_the_number_of_the_trial() -> None:
    plans = [make_plan(seed, ranks=RANKS, steps=100) for seed in range(20)]
    assert plans == [make_plan(seed, ranks=RANKS, steps=100) for seed in range(20)]
    assert {plan.rank for plan in plans} == set(range(RANKS))
    assert all(25 <= plan.step <= 75 and 0 <= plan.moment < 1 for plan in plans)
    assert isinstance(plans[0], Plan)


def trial(seconds: float, repeated: int, lost: int, difference: float | None) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "seconds_repeated": repeated * 0.5,
        "samples_repeated": repeated * BATCH,
        "samples_lost": lost,
        "worst_loss_difference": difference,
        "seconds_to_end": 1.0,
    }


def system(*trials: dict[str, Any], failures: int = 0) -> dict[str, Any]:
    return {"step_seconds": 0.5, "loss_difference": 0.0, "trials": list(trials), "failures": [{}] * failures}


def test_table() -> None:
    systems = {
        "elastic": system(trial(0.5, 0, 0, 1e-8), trial(0.7, 0, 0, 2e-8), trial(0.6, 0, 0, 0.0)),
        "restart": system(trial(24, 10, 0, 0.0), trial(36, 20, 0, 0.0), trial(30, 12, 0, 0.0)),
        "torchft": system(trial(6, 0, 100, None), failures=2),
        "horovod elastic": system(failures=3),
    }
    lines = table({"one-host": {"systems": systems}}).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert rows[2] == ["one-host", "elastic", "3", "0", "0.50", "0.60", "0.70", "1.0", "0.00", "0", "0", "2e-08", "1.0"]
    assert rows[3][5:] == ["30.00", "36.00", "50.0", "7.00", "224", "0", "0e+00", "1.0"]
    assert rows[4][:11] == ["one-host", "torchft", "3", "2", "0.50", "6.00", "6.00", "10.0", "0.00", "0", "100"]
    assert rows[5][:5] == ["one-host", "horovod elastic", "3", "3", "0.50"]


def test_losses_are_compared_where_both_are_known() -> None:
    known = {1: LoggedStep(2.0, BATCH), 2: LoggedStep(None, BATCH), 3: LoggedStep(4.0, BATCH)}
    others = {1: LoggedStep(2.0, BATCH), 2: LoggedStep(2.0, BATCH), 3: LoggedStep(5.0, BATCH)}
    assert worst_loss_difference(known, others) == pytest.approx(0.2)
    assert worst_loss_difference({}, others) == 0.0
