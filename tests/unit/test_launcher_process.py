"""A launcher that is killed is noticed by its ranks, and ranks of an unknown launcher do not train alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hvdlm.comm import launcher_process
from hvdlm.comm.launch import Launch
from hvdlm.comm.launcher_process import refuse_ranks_that_seem_alone, watch, watch_launcher
from hvdlm.errors import HvdlmError


class Process:
    """An ancestor."""

    def __init__(self, name: str, *words: str, children: int = 1, pid: int = 417) -> None:
        self.words, self.pid = list(words) or [name], pid
        self.name = lambda: name
        self.cmdline = lambda: self.words
        self.children = lambda: list(range(children))
        self.is_running = lambda: True
        self.status = lambda: psutil.STATUS_SLEEPING


def ancestors(monkeypatch: pytest.MonkeyPatch, *processes: Any) -> None:
    own = SimpleNamespace(parents=lambda: list(processes), parent=lambda: next(iter(processes), None))
    monkeypatch.setattr(psutil, "Process", lambda: own)


BASH = Process("bash", "bash", "-c", "cd /data; mpirun -np 2 hvdlm train")
# What becomes of `horovodrun --mpi`
MPIRUN_BY_SHELL = Process("sh", "/bin/sh", "-c", "mpirun --allow-run-as-root -np 2 hvdlm train", pid=6)


@pytest.mark.parametrize(
    "launcher",
    [
        Process("prterun", "mpirun", "-np", "2"),
        Process("prted"),
        Process("slurmstepd", "slurmstepd: [77.0]"),
        Process("horovodrun", "/usr/bin/python", "/opt/bin/horovodrun", "-np", "2"),
        Process("python3.11", "/usr/bin/python3.11", "/opt/bin/torchrun"),
        Process("python", "python", "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        Process("hydra_pmi_proxy"),
    ],
)
def test_a_launcher_is_known_by_its_name_or_words(monkeypatch: pytest.MonkeyPatch, launcher: Process) -> None:
    ancestors(monkeypatch, Process("sh"), Process("python", "python", "-c", "spawn_main()"), launcher, BASH)
    assert launcher_process.launcher_processes() == [launcher]


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_process_that_is_killed_is_noticed(monkeypatch: pytest.MonkeyPatch, is_reaped: bool) -> None:
    """Whether its parent has asked for its end, or it is a zombie."""
    monkeypatch.setattr(launcher_process, "_SECONDS_BETWEEN_CHECKS", 0.01)
    child = subprocess.Popen(["sleep", "100"])
    gone: list[int] = []
    has_ended = threading.Event()
    thread = watch([psutil.Process(), psutil.Process(child.pid)], lambda each: (gone.append(each.pid), has_ended.set()))  # type: ignore[func-returns-value]
    assert not has_ended.wait(0.1)
    child.kill()
    if is_reaped:
        child.wait()
    assert has_ended.wait(30)
    child.wait()
    thread.join(30)
    assert gone == [child.pid]


@pytest.fixture
def terminated() -> Iterator[threading.Event]:
    """Set by a SIGTERM to this process."""
    asked = threading.Event()
    handler = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    yield asked
    signal.signal(signal.SIGTERM, handler)


def test_a_rank_whose_launcher_is_gone_asks_itself_to_end(
    monkeypatch: pytest.MonkeyPatch, terminated: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = Process("horovodrun")
    gone.is_running = lambda: False
    ancestors(monkeypatch, Process("sh"), gone)
    watch_launcher(Launch("horovodrun", 1, 2))
    assert terminated.wait(30)
    said = capfd.readouterr().err
    assert "rank 1 on" in said and "horovodrun (process 417), which started this job, is gone" in said


@pytest.mark.parametrize(
    ("launch", "processes", "watched"),
    [
        (Launch("none", 0, 1), [Process("prterun")], []),
        (Launch("mpirun", 0, 2), [BASH, Process("sshd")], []),
        (Launch("horovodrun", 0, 2), [BASH, Process("sshd", pid=1), Process("sshd", pid=2)], [1]),
        (Launch("horovodrun", 0, 2), [Process("prterun", pid=5), MPIRUN_BY_SHELL, BASH], [5, 6]),
        (Launch("mpirun", 0, 2), [Process("prterun", pid=5), MPIRUN_BY_SHELL, BASH], [5]),
        (Launch("mpirun", 0, 2), [BASH, Process("prted", pid=3), Process("slurmstepd", pid=4)], [3, 4]),
    ],
)
def test_what_is_watched(
    monkeypatch: pytest.MonkeyPatch, launch: Launch, processes: list[Process], watched: list[int]
) -> None:
    """A shell or a login may end before a job that is to go on without them."""
    found: list[int] = []
    ancestors(monkeypatch, *processes)
    monkeypatch.setattr(launcher_process, "watch", lambda each, _: found.extend(one.pid for one in each))
    watch_launcher(launch)
    assert found == watched


def test_ranks_of_an_mpi_that_hvdlm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    ancestors(monkeypatch, Process("hydra_pmi_proxy", children=3), BASH)
    with pytest.raises(HvdlmError, match=r"hydra_pmi_proxy started this process on .* and 2 more, and none of its"):
        refuse_ranks_that_seem_alone(Launch("none", 0, 1))
    refuse_ranks_that_seem_alone(Launch("mpirun", 1, 3))
    ancestors(monkeypatch, Process("hydra_pmi_proxy", children=1), BASH)
    refuse_ranks_that_seem_alone(Launch("none", 0, 1))
    ancestors(monkeypatch, BASH, Process("hydra_pmi_proxy", children=2))
    refuse_ranks_that_seem_alone(Launch("none", 0, 1))


def test_a_starter_of_processes_by_its_name(tmp_path: Any) -> None:
    """In a process of its own: two that a program called mpiexec has started."""
    starter = tmp_path / "mpiexec"
    starter.write_text('#!/bin/sh\n"$@" &\n"$@"\nstatus=$?\nwait\nexit $status\n')
    starter.chmod(0o755)
    script = (
        "import time\nfrom hvdlm.comm.launch import detect\nfrom hvdlm.comm.launcher_process import "
        "refuse_ranks_that_seem_alone as refuse\ntime.sleep(0.3)\nrefuse(detect({}))"
    )
    done = subprocess.run([starter, sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert "mpiexec started this process on" in done.stderr
