"""Ranks that die between and in rounds of local steps: the others go on, and train on what was theirs and not sent."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from jobs import assert_same_curve, command, losses, records
from launcher import Result, run
from test_elastic import DYING, MPIRUN, SAVING
from test_elastic import SETTINGS as EVERY_STEP
from thorough import thorough

STEPS, BATCH = 30, 16
SETTINGS = {
    **EVERY_STEP, "local_steps__every": 5, "local_steps__warmup_steps": 5, "compression__codec": "int4",
    "model__width": 64, "train__global_batch_size": BATCH, "train__steps": STEPS,
}  # fmt: skip
OVERLAP = {"local_steps__fragments": 2, "local_steps__overlap": 2, "local_steps__momentum": 0.3}
ONCE = Counter((batch, index) for batch in range(STEPS) for index in range(BATCH))


def train(ranks: int, plan: str, data: Path, tmp_path: Path, *words: str, **overrides: object) -> Result:
    """A job in `tmp_path`/run, whose ranks note in `tmp_path`/noted what they train on; deaths as dying.py has them."""
    noted = tmp_path / "noted"
    noted.mkdir(exist_ok=True)
    arguments = command(data, tmp_path / "run", *words, **{**SETTINGS, **overrides})[1:]
    launcher = [*MPIRUN, str(ranks), "-x", f"HVDLM_SEQUENCES={noted}"]
    return run([*launcher, sys.executable, str(DYING), plan, *arguments], deadline=120)


def trained_on(tmp_path: Path, sent: dict[int, int]) -> Counter[tuple[int, int]]:
    """How often each sequence, batch and index, was trained on; of a rank in `sent` only before that step."""
    found: Counter[tuple[int, int]] = Counter()
    for path in (tmp_path / "noted").iterdir():
        rank = int(path.name.removeprefix("rank_"))
        # What has begun twice is one step: in the warm-up, a step that was taken back
        steps = dict(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        for step, sequences in steps.items():
            if step < sent.get(rank, STEPS):
                found.update((batch, index) for batch, index in sequences)
    return found


def assert_goes_on(result: Result, run_dir: Path, deaths: int) -> list[str]:
    """The last step is done, every line is there once, and every death is told once: what was told of them."""
    assert result.status == 0, result.output
    said = [str(each["message"]) for each in records(run_dir, "event") if "died" in str(each["message"])]
    assert sum(each.partition(" died")[0].count("rank ") for each in said) == deaths, said
    for kind in ("train", "eval"):
        steps = [int(str(each["step"])) for each in records(run_dir, kind)]
        assert steps == sorted(set(steps)), (kind, steps)
    assert max(losses(run_dir)) == STEPS
    return said


def steps_not_sent(said: str) -> int:
    """Of a dead rank, as told."""
    found = re.search(r"train again on what was theirs of the last (\d+) steps", said)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("place", "step", "sent"),
    [
        ("forward", 12, 10),
        thorough("begin_round", 14, 10),  # after the 15th step
        thorough("codec", 14, 10),
        ("merge", 14, 15),  # all that are left have the sums, and so what the dead rank has learned
    ],
)
def test_no_sequence_is_lost_or_repeated(place: str, step: int, sent: int, small_data: Path, tmp_path: Path) -> None:
    """Rounds follow steps 10, 15, ...: what a rank has sent of its last steps, it has sent by `sent`."""
    result = train(4, f"{place}:{step}:2", small_data, tmp_path)
    said = assert_goes_on(result, tmp_path / "run", 1)
    assert steps_not_sent(said[0]) == 15 - sent, said
    assert trained_on(tmp_path, {2: sent}) == ONCE


@pytest.mark.thorough
def test_while_the_batch_grows(small_data: Path, tmp_path: Path) -> None:
    """2 sequences in batches 0 to 2, 4 in 3 to 5, ..., 16 from 21 on."""
    sizes = [min(16, 2 + 2 * (batch // 3)) for batch in range(STEPS)]
    ramp = {"train__batch_ramp_start": 2, "train__batch_ramp_steps": 21}
    result = train(4, "forward:12:2", small_data, tmp_path, **ramp)
    (said,) = assert_goes_on(result, tmp_path / "run", 1)
    assert steps_not_sent(said) == 5
    once = Counter((batch, index) for batch, size in enumerate(sizes) for index in range(size))
    assert trained_on(tmp_path, {2: 10}) == once


@pytest.mark.parametrize(
    ("place", "step", "sent"),
    [("forward", 11, {8, 10}), thorough("forward", 14, {10, 13}), thorough("merge", 16, {15})],
)
def test_rounds_that_overlap(place: str, step: int, sent: set[int], small_data: Path, tmp_path: Path) -> None:
    """One fragment's rounds begin after steps 8, 13, 18, 23, the other's after 10, 15, 20, 25, and end two steps later.

    A round of which all that are left have the sums ends, though a rank has died meanwhile.
    """
    result = train(4, f"{place}:{step}:1", small_data, tmp_path, **OVERLAP)
    said = assert_goes_on(result, tmp_path / "run", 1)
    (goes_on_from,) = re.findall(r"go on from step (\d+)", said[0])
    own = int(goes_on_from) - steps_not_sent(said[0])
    assert own in sent, said
    assert trained_on(tmp_path, {1: own}) == ONCE


@pytest.mark.thorough
def test_one_after_the_other(small_data: Path, tmp_path: Path) -> None:
    """In the warm-up, where local steps begin, and then where some have ended a round and others have not."""
    plan = "forward:3:1,begin_local_steps:5:2,merge:9:3,kept_from_the_barrier:9:0,codec:14:4,round_residuals:14:5"
    result = train(6, plan, small_data, tmp_path)
    assert_goes_on(result, tmp_path / "run", 4)
    assert trained_on(tmp_path, {1: 3, 2: 5, 3: 10, 4: 10}) == ONCE
    assert "rank 5: had changed True, as before: True" in result.output, result.output


def test_rank_0_and_those_that_follow_it(small_data: Path, tmp_path: Path) -> None:
    """While it logs, validates, saves; and while the others go on. The curve stays near that of a whole job."""
    plan = "log:9:0,validation:9:1,saving:19:2,forward:22:3,recovery:24:4,reopening:24:5"
    result = train(7, plan, small_data, tmp_path, **SAVING)
    assert_goes_on(result, tmp_path / "run", 6)
    assert [each["step"] for each in records(tmp_path / "run", "eval")] == [10, 20, 30]
    assert trained_on(tmp_path, {0: 10, 1: 10, 2: 20, 3: 20, 4: 20, 5: 20}) == ONCE
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(4, "", small_data, whole, **SAVING).status == 0
    common = losses(whole / "run").keys() & losses(tmp_path / "run").keys()
    assert {10, 20, 30} <= common
    own, expected = ({step: losses(each / "run")[step] for step in common} for each in (tmp_path, whole))
    assert_same_curve(own, expected, relative=0.1)


def test_too_few_are_left(small_data: Path, tmp_path: Path) -> None:
    """What is still to be made up for is saved, and made up for by the run that goes on."""
    result = train(3, "forward:12:2", small_data, tmp_path, comm__min_ranks=3)
    assert result.status == 75, result.output
    assert max(losses(tmp_path / "run")) == 15
    assert train(2, "", small_data, tmp_path, "--resume", "latest", comm__min_ranks=2).status == 0
    assert trained_on(tmp_path, {2: 10}) == ONCE


def test_no_step_is_left_to_make_up_for_it(small_data: Path, tmp_path: Path) -> None:
    result = train(4, "forward:28:3", small_data, tmp_path)
    (said,) = assert_goes_on(result, tmp_path / "run", 1)
    assert "what was learned from 20 sequences of the last 5 steps is lost" in said  # 4 of 16 in each step
