"""Signals become a wish to stop: in this process, and in a child that gets them from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from hvdlm.exit_status import INTERRUPTED, STOPPED_EARLY
from hvdlm.training.preemption import Preemption

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
NAMES = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]

CHILD = """
import sys, time
from hvdlm.training.preemption import Preemption
with Preemption(["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]) as preemption:
    print("ready", flush=True)
    while not preemption.requested:
        time.sleep(0.01)
    print("asked to stop", flush=True)
    sys.stdin.readline()  # the signal comes again meanwhile
print("ended in good order", flush=True)
sys.stdin.readline()  # and again after the block
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_to_this_process_is_a_wish_and_nothing_else(number: int) -> None:
    with Preemption(NAMES) as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested


def test_without_a_signal_the_handlers_are_as_before() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with Preemption(NAMES):
        assert [signal.getsignal(number) for number in NUMBERS] != before
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_error_in_the_block_is_not_swallowed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="mine"), Preemption(NAMES):
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGTERM) == before


def test_after_a_signal_more_of_them_are_ignored() -> None:
    with Preemption(NAMES) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested
    # not by a handler of Python's, which it takes away on its way out
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_IGN] * 4
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_child_ends_in_good_order_however_often_it_is_told(number: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    for line in ("ready\n", "asked to stop\n", "ended in good order\n"):
        assert child.stdout.readline() == line
        child.send_signal(number)
        if line != "ready\n":
            child.stdin.write("\n")
            child.stdin.flush()
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (7, "")


def test_a_second_interrupt_ends_at_once() -> None:
    """Not one that a launcher passes on twice, within a second."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "asked to stop\n"
    child.send_signal(signal.SIGINT)
    time.sleep(1.1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert (child.returncode, output) == (INTERRUPTED, "")
    assert errors == "hvdlm: interrupted again: it ends at once, without a checkpoint\n"


def test_signals_that_are_not_chosen_do_what_they_did() -> None:
    with Preemption(["SIGUSR2"]) as preemption:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.requested
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Preemption(NAMES) as preemption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not preemption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_exit_status_of_a_run_that_stopped_early_is_sysexits_s() -> None:
    assert STOPPED_EARLY == os.EX_TEMPFAIL == 75
