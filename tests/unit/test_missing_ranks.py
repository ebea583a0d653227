"""Ranks tell each other beside the engine that they have failed, and end those that wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing

import pytest
from thread_rank import on_threads

from hvdlm.comm import missing_ranks
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.liveness import LivenessServer, ask_state
from hvdlm.comm.missing_ranks import MissingRankReporter

SOON, LONG = 0.5, 60.0  # seconds


def on_ranks(size: int, body: Callable[[Communicator, MissingRankReporter], object]) -> list[object]:
    """What `body` returns on each of some ranks, all of one host."""
    have_ended = threading.Barrier(size, timeout=60)

    def run(communicator: Communicator) -> object:
        communicator.hosts = ["here"] * size
        reporter = MissingRankReporter(communicator)
        result = body(communicator, reporter)
        have_ended.wait()  # as the barrier of a job: a rank that has left answers nobody
        reporter.close()
        return result

    return on_threads(size, run)


def test_an_error_of_all_ranks_is_known_to_be_one() -> None:
    def body(communicator: Communicator, reporter: MissingRankReporter) -> object:
        return reporter.have_all_failed(LONG) if communicator.rank == 0 else reporter.has_rank_0_seen_all_fail(LONG)

    assert on_ranks(4, body) == [True] * 4


def test_an_error_of_rank_0_alone() -> None:
    def body(communicator: Communicator, reporter: MissingRankReporter) -> object:
        return reporter.have_all_failed(SOON) if communicator.rank == 0 else "at work"

    assert on_ranks(3, body) == [False, "at work", "at work"]


def test_of_several_ranks_without_rank_0_the_lowest_says_it() -> None:
    """The others wait to be ended by it."""

    def body(communicator: Communicator, reporter: MissingRankReporter) -> object:
        return "at work" if communicator.rank in (0, 2) else reporter.has_rank_0_seen_all_fail(SOON)

    assert on_ranks(4, body) == ["at work", False, "at work", None]


def test_a_rank_that_is_behind_is_named_with_what_it_does() -> None:
    def body(communicator: Communicator, reporter: MissingRankReporter) -> object:
        reporter._server.doing = lambda: "waits for step 7, for 9 s" if communicator.rank != 2 else "reads, for 12 s"
        communicator.barrier()
        said = reporter.report() if communicator.rank == 0 else ""
        communicator.barrier()
        return said

    assert on_ranks(4, body)[0] == "rank 2 on here is behind: it reads, for 12 s"


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(missing_ranks.os, "_exit", lambda status: ended.append(status))

    def body(communicator: Communicator, reporter: MissingRankReporter) -> object:
        if communicator.rank == 1:
            reporter.end_others()
        return None

    on_ranks(3, body)
    assert ended == [1, 1]


def test_who_does_not_belong_to_the_job_cannot_end_it() -> None:
    """A stranger who connects is told the token, and may send it back."""
    ended = threading.Event()
    with closing(LivenessServer("token ", 0.05, password="a password", on_end=ended.set)) as server:
        for said in ("token ", "a passwort", ""):
            assert ask_state("127.0.0.1", server.port, "token ", 5, said) == ""
        assert ask_state("127.0.0.1", server.port, "token ", 5) == ""  # the one before has been dealt with
        assert not ended.is_set()
        ask_state("127.0.0.1", server.port, "token ", 5, "a password")
        assert ended.wait(30)


def test_a_report_names_those_that_do_not_answer() -> None:
    have_left = threading.Barrier(3, timeout=60)

    def body(communicator: Communicator) -> str:
        communicator.hosts = ["here"] * 3
        reporter = MissingRankReporter(communicator)
        if communicator.rank == 2:
            reporter.close()
        have_left.wait()
        said = reporter.report() if communicator.rank == 0 else ""
        have_left.wait()
        if communicator.rank != 2:
            reporter.close()
        return said

    assert on_threads(3, body)[0] == "rank 2 on here does not answer: stopped, dead, or out of reach"
