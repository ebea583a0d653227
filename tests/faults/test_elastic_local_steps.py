"""Ranks that die between and in rounds of local steps: the others go on, and train on what was theirs and not sent."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from jobs import assert_same_curve, losses, records
from launcher import Result
from test_elastic import SAVING, train

STEPS = 30
BATCH = 16
SETTINGS = {
    "local_steps__every": 5, "local_steps__warmup_steps": 5, "train__steps": STEPS, "compression__codec": "int4",
    "model__width": 64, "train__global_batch_size": BATCH,
}  # fmt: skip
OVERLAP = {"local_steps__fragments": 2, "local_steps__overlap": 2}


def train_noting(ranks: int, plan: str, data: Path, tmp_path: Path, **overrides: object) -> tuple[Result, Path]:
    """The job's result, and where each rank has noted what it has trained on."""
    noted = tmp_path / "noted"
    noted.mkdir()
    os.environ["HVDLM_SEQUENCES"] = str(noted)
    try:
        return train(ranks, plan, data, tmp_path / "run", **{**SETTINGS, **overrides}), noted
    finally:
        del os.environ["HVDLM_SEQUENCES"]


def trained_on(noted: Path, sent: dict[int, int]) -> Counter[tuple[int, int]]:
    """How often each sequence, batch and index, was trained on; of a rank in `sent` only before that step."""
    found: Counter[tuple[int, int]] = Counter()
    for path in noted.iterdir():
        rank = int(path.name.removeprefix("rank_"))
        for line in path.read_text(encoding="utf-8").splitlines():
            step, sequences = json.loads(line)
            if step < sent.get(rank, STEPS):
                found.update((batch, index) for batch, index in sequences)
    return found


def assert_goes_on(result: Result, run_dir: Path, deaths: int) -> list[str]:
    """The last step is done, and every death told once; what was told of them."""
    assert result.status == 0, result.output
    said = [str(each["message"]) for each in records(run_dir, "event") if "died" in str(each["message"])]
    assert sum(each.partition(" died")[0].count("rank ") for each in said) == deaths, said
    steps = [int(str(each["step"])) for each in records(run_dir, "train")]
    assert steps == sorted(set(steps)), steps
    assert steps[-1] == STEPS
    return said


ONCE = Counter((batch, index) for batch in range(STEPS) for index in range(BATCH))


@pytest.mark.parametrize(
    ("place", "step", "sent"),
    [
        ("forward", 12, 10),
        ("begin_round", 14, 10),  # after the 15th step
        ("codec", 14, 10),
        ("merge", 14, 15),  # all that are left have the sums, and so what the dead rank has learned
    ],
)
def test_no_sequence_is_lost_or_repeated(place: str, step: int, sent: int, small_data: Path, tmp_path: Path) -> None:
    """Rounds follow steps 10, 15, ...: what a rank has sent of its last steps, it has sent by `sent`."""
    result, noted = train_noting(4, f"{place}:{step}:2", small_data, tmp_path)
    said = assert_goes_on(result, tmp_path / "run", 1)
    assert trained_on(noted, {2: sent}) == ONCE, said
    assert ("train again" in said[0]) == (sent < step + (place != "forward"))
