"""How long a rank waits: time in which it was suspended itself does not count, and what it waits for is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from types import SimpleNamespace

import pytest

from hvdlm.comm import failure
from hvdlm.comm.failure import LostRankError, RunningTime, result_within, say, wait_until


@pytest.fixture
def goes_on_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets a clock that goes on by each of some steps in turns, one at each look, and by the last of them for ever."""

    def set_clock(*steps: float) -> None:
        moments = itertools.accumulate(itertools.chain([100.0], steps, itertools.repeat(steps[-1])))
        clock = SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda _: None)
        monkeypatch.setattr(failure, "time", clock)

    return set_clock


def test_a_long_step_counts_as_a_short_one(goes_on_by: Callable[..., None]) -> None:
    goes_on_by(0.25, 0.5, 3600.0, 0.25)
    running = RunningTime()
    assert [running.seconds() for _ in range(4)] == [0.25, 0.75, 1.75, 2.0]


def test_a_rank_that_was_suspended_waits_as_long_as_before(goes_on_by: Callable[..., None]) -> None:
    """An hour of sleep between two looks, with a timeout of ten seconds: it still waits, and is then served."""
    goes_on_by(0.5, 3600.0, 0.5)
    looks = itertools.count()
    wait_until(lambda: next(looks) > 60, timeout=10, rank=1, what="the other ranks")


def test_a_rank_that_runs_gives_up_in_time(goes_on_by: Callable[..., None]) -> None:
    goes_on_by(0.5)
    looks = itertools.count()
    with pytest.raises(LostRankError, match=r"rank 1 on .* waited 10 s \(comm.timeout\) for rank 0 to send"):
        wait_until(lambda: next(looks) > 1000, timeout=10, rank=1, what="rank 0 to send")
    assert next(looks) < 80  # half a second each, after the looks without sleep


class Slow(Future[int]):
    """A future that nobody waits for in earnest; its result comes at the last of some looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def result(self, timeout: float | None = None) -> int:
        self.looks -= 1
        if not self.looks:
            self.set_result(7)
        if self.looks > 0:
            raise WaitTimeout
        return super().result(timeout)


def test_a_result_is_waited_for_without_the_time_of_a_suspension(goes_on_by: Callable[..., None]) -> None:
    goes_on_by(0.5, 3600.0, 0.5)
    assert result_within(Slow(10), 10, 0, "the other ranks") == 7
    with pytest.raises(LostRankError, match="waited 10 s"):
        result_within(Slow(100), 10, 0, "the other ranks")


def test_a_result_that_is_an_error_is_raised() -> None:
    future: Future[int] = Future()
    future.set_exception(WaitTimeout("of the engine itself"))
    with pytest.raises(WaitTimeout, match="of the engine itself"):
        result_within(future, 10, 0, "the other ranks")


class Full:
    """Nothing can be written to it."""

    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")


def test_a_stderr_that_cannot_be_written_to_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("")
    say("the job ends")
    assert capsys.readouterr().err == "the job ends\n"
    for stderr in (Full(), None):
        monkeypatch.setattr(failure, "sys", SimpleNamespace(stderr=stderr))
        say("the job ends")
