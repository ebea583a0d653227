"""What a job of ranks that a cluster starts makes of how its ranks have ended."""

from __future__ import annotations

import pytest

from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.launch.job import Job, RanksLostError, run_attempts
from hvdlm.launch.rank import Outcome

DONE = Outcome(9.0, 0, "step 3\n")
KILLED = Outcome(2.0, -9, "step 2\n")


def job(restarts: int = 1) -> Job:
    return Job(settings="", ranks=2, cpus_per_rank=1, gpus_per_rank=0, restarts=restarts)


def test_the_attempt_after_a_kill_counts(caplog: pytest.LogCaptureFixture) -> None:
    attempts = iter([[DONE, KILLED], [DONE, DONE]])
    assert run_attempts(job(), lambda: next(attempts)) == 0
    assert caplog.messages == ["attempt 1 of 2: rank 1 was killed by signal 9"]


def test_a_run_that_was_asked_to_end_is_not_begun_again() -> None:
    assert run_attempts(job(), lambda: [DONE, Outcome(9.0, STOPPED_EARLY, "")]) == STOPPED_EARLY


def test_the_last_attempt_is_counted() -> None:
    def lost() -> list[Outcome]:
        raise RanksLostError("a task has died")

    with pytest.raises(HvdlmError, match=r"^the job was lost 2 times \(--restarts\); the last time a task has died$"):
        run_attempts(job(restarts=1), lost)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        # rank 0 alone says what all have met, and ends last
        (["hvdlm: error: no such data set\n", ""], "rank 0 ended with 1: hvdlm: error: no such data set"),
        # the others' rank is lost to them: the first error is the cause
        (["hvdlm: error: rank 1 is lost\n", "hvdlm: error: full\n"], "rank 1 ended with 1: hvdlm: error: full"),
        (["step 1\nKilled\n", ""], "rank 1 ended with 1: it said nothing"),
        (["", "Traceback\nOSError: 5\n"], "rank 1 ended with 1: OSError: 5"),
    ],
)
def test_an_error_is_said_and_not_met_again(said: list[str], sentence: str) -> None:
    outcomes = [Outcome(2.0 - rank, 1, each) for rank, each in enumerate(said)]
    with pytest.raises(HvdlmError) as caught:
        run_attempts(job(), lambda: outcomes)
    assert str(caught.value) == sentence
