"""Ranks that start once and run many checks: `RankPool`, the side of the tests. worker.py is the side of the ranks.

Starting a rank costs seconds of computing, most of it importing torch; a check on ranks that are there costs next to
nothing. Ranks talk to the test over a socket of their own, so that whatever a check does to the engine under test, its
outcome arrives. After a failure the ranks are killed, and the next check gets new ones.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import psutil
from checks import DEADLINE
from launcher import Job, launcher_command, start

WORKER = Path(__file__).with_name("worker.py")

START_SECONDS = 120.0  # until all ranks have come
GRACE_SECONDS = 5.0  # for the other ranks, after one has failed
END_SECONDS = 60.0  # for all ranks to leave in good order

# The ranks write their stacks to their logs at this signal; hvdlm itself uses it for nothing
SHOW_STACKS = signal.SIGUSR2


@dataclass(frozen=True)
class Request:
    """What the first `size` ranks are asked to run."""

    module: Path  # file of a Python module, imported once by each rank
    function: str  # its name there; called with the communicator of the group first
    size: int
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one rank says of one request, or of its start."""

    rank: int
    process: int
    value: Any = None
    error: str | None = None  # its traceback; None if all went well
    output: str = ""  # stdout and stderr


class RanksFailed(AssertionError):
    """Some rank has failed, died or not answered in time; the text holds each rank's traceback and output."""


# For a launcher to print why it ends
_SECONDS_TO_SAY = 3.0


class RankPool:
    """Ranks of one engine under one launcher, started at the first request."""

    def __init__(self, engine: str, launcher: str, size: int, environment: Mapping[str, str] | None = None) -> None:
        """`launcher` is one of `launcher.launcher_command`; `environment`: more variables for the ranks."""
        self.engine, self.launcher, self.size = engine, launcher, size
        self._environment = dict(environment or {})
        self._job: Job | None = None
        self._connections: dict[int, Connection] = {}  # by rank
        self._processes: dict[int, int] = {}  # identifiers, by rank
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, module: Path, function: str, size: int, deadline: float = DEADLINE, **keywords: Any) -> list[Answer]:
        """Runs a function of a module on the first `size` ranks and returns what each has answered, by rank.

        Raises RanksFailed unless all of them answer within `deadline` seconds that all went well; the ranks are then
        ended, and the next call starts new ones.
        """
        try:
            if self._job is None:
                self._start()
            request = Request(Path(module).resolve(), function, size, keywords)
            answers = self._ask(request, time.monotonic() + deadline)
        except BaseException:
            self.kill()
            raise
        return answers

    def ask_to_leave(self) -> None:
        """Tells the ranks to end, so that several pools can do so at a time; `close` follows."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # it has left already
                connection.send(None)

    def close(self) -> None:
        """Ends the ranks in good order, and fails if they do not."""
        if self._job is None:
            return
        try:
            self.ask_to_leave()
            result = self._job.finish(END_SECONDS)
            assert result.status == 0, f"{self} ended with {result.status}:\n{result.output}\n{self._logs()}"
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends every process of the pool at once."""
        for connection in self._connections.values():
            connection.close()
        self._connections, self._processes = {}, {}
        if self._job is not None:
            self._job.__exit__()
            self._job = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __str__(self) -> str:
        return f"pool of {self.size} ranks, engine {self.engine}, {self.launcher}"

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hvdlm-pool-")
        address, key = f"{self._folder.name}/socket", os.urandom(16)
        arrived: queue.Queue[Connection] = queue.Queue()
        with Listener(address, authkey=key, backlog=self.size) as listener:
            threading.Thread(target=_accept, args=(listener, self.size, arrived), daemon=True).start()
            words = [*launcher_command(self.launcher, self.size), sys.executable, str(WORKER), self.engine]
            variables = {"HVDLM_POOL_FOLDER": self._folder.name, "HVDLM_POOL_KEY": key.hex()}
            self._job = start(words, {**self._environment, **variables})
            connections = self._wait_for_ranks(arrived)
        all_came = len(connections) == self.size
        for connection in connections:
            if not all_came and not connection.poll():
                continue  # it waits for the ranks that did not come
            try:
                answer: Answer = connection.recv()  # that it has joined the job, or why not
            except (EOFError, ConnectionResetError):
                continue  # its launcher has ended it because of another rank
            self._connections[answer.rank], self._processes[answer.rank] = connection, answer.process
            if answer.error is not None:
                raise RanksFailed(f"{self}: rank {answer.rank} did not start:\n{answer.error}\n{self._end_and_read()}")
        if not all_came:
            came = f"{len(connections)} of {self.size} ranks came within {START_SECONDS:g} s"
            raise RanksFailed(f"{self}: {came}\n{self._end_and_read()}")
        assert sorted(self._connections) == list(range(self.size)), f"{self}: ranks {sorted(self._connections)} came"

    def _wait_for_ranks(self, arrived: queue.Queue[Connection]) -> list[Connection]:
        """The connections of all ranks, or of those that came in time and before the job ended."""
        assert self._job is not None
        deadline = time.monotonic() + START_SECONDS
        connections: list[Connection] = []
        while len(connections) < self.size and time.monotonic() < deadline:
            has_ended = self._job.process.poll() is not None  # before looking, so that no connection is left out
            try:
                connections.append(arrived.get(timeout=0.2))
            except queue.Empty:
                if has_ended:
                    break
        return connections

    def _ask(self, request: Request, deadline: float) -> list[Answer]:
        for rank in range(request.size):
            with contextlib.suppress(BrokenPipeError):  # a rank that has died is found below
                self._connections[rank].send(request)
        waiting = {self._connections[rank]: rank for rank in range(request.size)}
        answers: dict[int, Answer] = {}
        dead: list[int] = []
        has_failed = False
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    dead.append(rank)
            if not has_failed and (dead or any(answer.error for answer in answers.values())):
                has_failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answers) == request.size and not has_failed:
            return [answers[rank] for rank in range(request.size)]
        raise RanksFailed(self._report(request, answers, dead, sorted(waiting.values())))

    def _report(self, request: Request, answers: Mapping[int, Answer], dead: list[int], silent: list[int]) -> str:
        """Of a request that has failed: what every rank says, and where the silent ones are."""
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank], SHOW_STACKS)
        if silent:
            time.sleep(0.5)  # for the stacks to be written
        lines = [f"{request.module.name}: {request.function}({dict(request.keywords)}) on {request.size} of {self}"]
        for rank in range(request.size):
            if rank in answers:
                error = answers[rank].error
                said = f"went well\n{answers[rank].output}" if error is None else f"\n{error}\n{answers[rank].output}"
            else:
                said = f"{'died' if rank in dead else 'did not answer'}\n{self._log(rank)}"
            lines.append(f"---- rank {rank}: {said}".rstrip())
        if dead:
            lines.append(f"---- launcher: {self._end_and_read()}")
        return "\n".join(lines)

    def _log(self, rank: int) -> str:
        assert self._folder is not None
        file = Path(self._folder.name) / f"rank_{rank}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def _logs(self) -> str:
        return "\n".join(f"---- rank {rank}:\n{self._log(rank)}" for rank in range(self.size))

    def _end_and_read(self) -> str:
        """Kills the job and returns what its launcher has said, and each rank that has no connection.

        A launcher whose ranks have died first has some seconds to say so.
        """
        assert self._job is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._job.process.wait(_SECONDS_TO_SAY)
        with contextlib.suppress(psutil.Error):
            self._job.kill()
        return f"{self._job.process.communicate()[0]}\n{'' if self._connections else self._logs()}"


def _accept(listener: Listener, count: int, arrived: queue.Queue[Connection]) -> None:
    """Accepts `count` connections; ends early when the listener is closed."""
    for _ in range(count):
        try:
            arrived.put(listener.accept())
        except OSError:
            return
        except Exception:
            traceback.print_exc()
            return


class Pools:
    """The pools of a session, by engine, launcher and size.

    Ranks of MPI wait for requests without computing. Those of others do not: Horovod looks for work a thousand times a
    second, and Gloo a hundred times for each group that a check has split off. So they end when others are asked for.
    """

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str, int], RankPool] = {}

    def get(self, engine: str, launcher: str, size: int) -> RankPool:
        """The pool of these ranks, which start at the first request."""
        key = (engine, launcher, size)
        for other, pool in self._pools.items():
            if other != key and pool.engine in ("horovod", "torch"):
                pool.close()
        return self._pools.setdefault(key, RankPool(engine, launcher, size))

    def close(self) -> None:
        """Ends all; fails if one does not end in good order."""
        for pool in self._pools.values():
            pool.ask_to_leave()
        errors = []
        for pool in self._pools.values():
            try:
                pool.close()
            except AssertionError as error:
                errors.append(str(error))
        assert not errors, "\n".join(errors)
