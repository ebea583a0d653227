"""A job whose ranks are suspended while other jobs are measured."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from common.processes import cause_of_failure, end_launcher, start_launcher
from common.setups import Cluster, horovodrun
from compare.measurement import Measurement, Request, over_ranks
from compare.registry import LIMIT, SystemGroup

_WORKER = Path(__file__).with_name("compare_worker.py")

_START_SECONDS = 180.0  # until all ranks have connected
_REPLY_SECONDS = 1800.0
_END_SECONDS = 60.0
_POLL_SECONDS = 0.1


class JobCrashError(Exception):
    """A job has ended by itself; the message is the cause."""


class Job:
    """Ranks under a launcher, each connected to this process by a Unix socket.

    Between measurements the ranks are suspended by SIGSTOP: threads of communication libraries use cores even while
    nothing is sent (Horovod's looks for work a thousand times a second).
    """

    def __init__(self, cluster: Cluster, group: SystemGroup, config: Path, scratch: Path) -> None:
        """Starts the ranks and returns when they have built all systems. Raises JobCrashError, with all ranks ended."""
        self._log = scratch / "log"
        address = scratch / "socket"
        address.unlink(missing_ok=True)
        worker = [sys.executable, str(_WORKER), str(address), str(config), cluster.interface or "", group.engine]
        self._members: list[_Member] = []
        with socket.socket(socket.AF_UNIX) as server, self._log.open("wb") as log:
            server.bind(str(address))
            server.listen(cluster.setup.ranks)
            start = horovodrun(cluster, group.horovodrun) if group.horovodrun else cluster.launcher
            self._launcher = start_launcher([*start, *worker, *group.names], log)
            try:
                self._members = self._accept(server, cluster.setup.ranks)
                self._replies()
            except BaseException:
                self.kill()
                raise
        self._suspend()

    def measure(self, request: Request) -> Measurement:
        """Resumes the ranks and measures one system. Raises JobCrashError, with all ranks ended.

        Raises AssertionError if the ranks then hold different models.
        """
        for member in self._members:
            member.process.resume()
        try:
            for member in self._members:
                member.connection.send(request)
            replies = self._replies()
        except BrokenPipeError:
            self.kill()
            raise JobCrashError(cause_of_failure(self._log)) from None
        except BaseException:
            self.kill()
            raise
        self._suspend()
        hashes = {model_hash for _, model_hash in replies}
        assert len(hashes) == 1 or request.system == LIMIT, f"ranks of {request.system} hold different models"
        return over_ranks([measurement for measurement, _ in replies])

    def close(self) -> None:
        """Lets the ranks end, and kills those that do not within a minute."""
        for member in self._members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.process.resume()
            member.connection.close()
        try:
            self._launcher.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends the ranks at once."""
        for member in self._members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.process.kill()
            member.connection.close()
        end_launcher(self._launcher)

    def _accept(self, server: socket.socket, ranks: int) -> list[_Member]:
        members: list[_Member] = []
        deadline = time.monotonic() + _START_SECONDS
        server.settimeout(_POLL_SECONDS)
        while len(members) < ranks:
            try:
                end, _ = server.accept()
            except TimeoutError:
                if self._launcher.poll() is not None or time.monotonic() > deadline:
                    raise JobCrashError(cause_of_failure(self._log)) from None
                continue
            # The process id of the other end. A rank on an emulated host does not know it: there it has another one
            process_id, _, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            members.append(_Member(Connection(end.detach()), psutil.Process(process_id)))
        return members

    def _replies(self) -> list[Any]:
        deadline = time.monotonic() + _REPLY_SECONDS
        replies = []
        for member in self._members:
            try:
                if not member.connection.poll(max(0.0, deadline - time.monotonic())):
                    raise JobCrashError(f"no reply within {_REPLY_SECONDS:g} s; {cause_of_failure(self._log)}")
                replies.append(member.connection.recv())
            except (EOFError, ConnectionResetError):
                with contextlib.suppress(subprocess.TimeoutExpired):  # by then the launcher has written the cause
                    self._launcher.wait(_END_SECONDS)
                raise JobCrashError(cause_of_failure(self._log)) from None
        return replies

    def _suspend(self) -> None:
        for member in self._members:
            member.process.suspend()


@dataclass(frozen=True)
class _Member:
    connection: Connection[Any, Any]
    process: psutil.Process
