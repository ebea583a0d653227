"""The pool of ranks itself: whatever goes wrong on a rank is a failure that shows it, and the next check runs."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import faulty
import pytest
from checks import Group, assert_every_check_runs, cases_of
from launcher import Job
from pool import RankPool, RanksFailed

FAULTY = Path(faulty.__file__)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool("mpi", "mpirun", 2)
    yield pool
    pool.close()


def members(pool: RankPool) -> list[int]:
    assert isinstance(pool._job, Job)
    return [process.pid for process in pool._job.members()]


def test_all_ranks_answer_and_stay(pool: RankPool) -> None:
    answers = pool.run(FAULTY, "check_nothing", 2)
    assert [(answer.rank, answer.value) for answer in answers] == [(0, 0), (1, 1)]
    assert [answer.output for answer in answers] == ["rank 0 was here\n", "rank 1 was here\n"]
    (alone,) = pool.run(FAULTY, "check_nothing", 1)
    assert [alone.process] == [answers[0].process]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "check_that_fails_on_one_rank",
            ["rank 0: went well", "rank 1: \nTraceback", "ZeroDivisionError: on one"],
        ),
        ("check_that_fails_while_others_wait", ["rank 0: did not answer", "in barrier", "ZeroDivisionError"]),
        ("check_that_hangs", ["rank 0: went well", "rank 1: did not answer", "in check_that_hangs"]),
        ("check_whose_rank_dies", ["rank 1: died\nthe last words of rank 1", "exit"]),
        ("check_of_another_name", ["rank 0: \nTraceback", "AttributeError"]),
    ],
)
def test_a_fault_is_told_and_does_no_harm_to_the_next(pool: RankPool, function: str, said: list[str]) -> None:
    pool.run(FAULTY, "check_nothing", 2)
    before = members(pool)
    with pytest.raises(RanksFailed) as failure:
        pool.run(FAULTY, function, 2, deadline=5 if function == "check_that_hangs" else 60)
    for part in said:
        assert part in str(failure.value)
    assert f"faulty.py: {function}" in str(failure.value)
    answers = pool.run(FAULTY, "check_nothing", 2)
    assert len(answers) == 2
    assert not set(before) & set(members(pool))


def test_a_check_leaves_nothing_to_the_next(pool: RankPool, tmp_path: Path) -> None:
    pool.run(FAULTY, "check_that_leaves_traces", 2)
    body = tmp_path / "no_traces.py"
    body.write_text("import os\ndef check(comm): return 'HVDLM_TRACE' in os.environ, os.getcwd()\n", encoding="utf-8")
    assert {answer.value for answer in pool.run(body, "check", 2)} == {(False, str(Path.cwd()))}


def test_ranks_that_cannot_start() -> None:
    pool = RankPool("solo", "mpirun", 2)  # an engine for one rank
    with pytest.raises(RanksFailed, match=r"did not start:(.|\n)*leave comm.engine at auto"):
        pool.run(FAULTY, "check_nothing", 2)
    pool.close()


def test_checks_that_no_item_runs() -> None:
    body = types.ModuleType("empty_body")
    body.__file__ = "empty_body.py"
    with pytest.raises(AssertionError, match="empty_body has no checks"):
        assert_every_check_runs(body, [])
    with pytest.raises(AssertionError, match="check_that_hangs"):
        only = [case for case in cases_of(faulty, [Group("mpi", "mpirun", 2, 2)]) if "hangs" not in case.function]
        assert_every_check_runs(faulty, only)
