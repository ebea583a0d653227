"""Ranks that die while tasks of lm-evaluation-harness are scored in training: each step's scores are written once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import records
from launcher import Result
from small_tasks import write_tasks
from test_elastic import SAVING, assert_goes_on, train, undisturbed

__all__ = ["undisturbed"]  # a fixture

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return {**SAVING, "train__evaluate_tasks": f"{folder / 'text.yaml'},{folder / 'choice.yaml'}"}


def assert_scores(result: Result, run_dir: Path, whole: Path, deaths: int) -> None:
    """As in the run in which nobody has died, whose weights differ by the rounding of sums."""
    assert_goes_on(result, run_dir, whole, deaths)
    own, expected = records(run_dir, "tasks"), records(whole, "tasks")
    assert [each["step"] for each in own] == [each["step"] for each in expected] == [10, 20, 30]
    for one, other in zip(own, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["text/byte_perplexity"] == pytest.approx(other["text/byte_perplexity"], rel=1e-3)


@pytest.mark.thorough
def test_before_and_in_the_tasks(
    small_data: Path, tmp_path: Path, settings: dict[str, object], undisturbed: Callable[..., Path]
) -> None:
    result = train(4, "answering:9:1,tasks:19:3,answering:29:2", small_data, tmp_path / "run", **settings)
    assert_scores(result, tmp_path / "run", undisturbed(**settings), deaths=3)


def test_rank_0_and_those_that_follow_it(
    small_data: Path, tmp_path: Path, settings: dict[str, object], undisturbed: Callable[..., Path]
) -> None:
    """The next one loads the tasks itself, and scores what was not written, once."""
    plan = "written_scores:9:0,unwritten_scores:19:1,answering:29:2"
    result = train(4, plan, small_data, tmp_path / "run", **settings)
    assert_scores(result, tmp_path / "run", undisturbed(**settings), deaths=3)
