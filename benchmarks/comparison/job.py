"""A job of ranks that stand still, without using a core, until it is their turn."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from common.setups import Place, environment
from comparison.lineup import LIMIT, Crew
from comparison.turns import Request, Turn, over_ranks

_RANK = Path(__file__).with_name("rank.py")

_START_SECONDS = 180.0  # until all ranks have come
_TURN_SECONDS = 1800.0
_END_SECONDS = 60.0
_POLL_SECONDS = 0.1


class Crashed(Exception):
    """A job is no more; says why."""


class Job:
    """Ranks under a launcher, each at the other end of a socket in the file system, whatever its network.

    Between turns they are stopped by a signal: libraries have threads that are busy even while nothing is sent
    (Horovod's looks for work a thousand times a second).
    """

    def __init__(self, place: Place, crew: Crew, config: Path, scratch: Path) -> None:
        """Starts the ranks and returns when all contestants are built. Raises Crashed, and leaves nothing behind."""
        self._log = scratch / "log"
        address = scratch / "socket"
        address.unlink(missing_ok=True)
        rank = [sys.executable, str(_RANK), str(address), str(config), place.interface or "", crew.engine, *crew.names]
        self._members: list[_Member] = []
        with socket.socket(socket.AF_UNIX) as server, self._log.open("wb") as log:
            server.bind(str(address))
            server.listen(place.setup.ranks)
            self._launcher = subprocess.Popen(
                [*place.launcher, *rank],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the race, which ends its jobs
            )
            try:
                self._members = self._accept(server, place.setup.ranks)
                self._replies()
            except BaseException:
                self.kill()
                raise
        self._suspend()

    def turn(self, request: Request) -> Turn:
        """Lets the ranks go on for one turn. Raises Crashed, and leaves nothing behind.

        Raises AssertionError if replicas differ afterwards.
        """
        for member in self._members:
            member.process.resume()
        try:
            for member in self._members:
                member.connection.send(request)
            replies = self._replies()
        except BrokenPipeError:
            self.kill()
            raise Crashed(self._last_words()) from None
        except BaseException:
            self.kill()
            raise
        self._suspend()
        digests = {digest for _, digest in replies}
        assert len(digests) == 1 or request.contestant == LIMIT, f"ranks of {request.contestant} hold different models"
        return over_ranks([turn for turn, _ in replies])

    def close(self) -> None:
        """Ends the ranks in good order, or after a time in any."""
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
        self._launcher.terminate()
        try:
            self._launcher.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait()

    def _accept(self, server: socket.socket, ranks: int) -> list[_Member]:
        members: list[_Member] = []
        deadline = time.monotonic() + _START_SECONDS
        server.settimeout(_POLL_SECONDS)
        while len(members) < ranks:
            try:
                end, _ = server.accept()
            except TimeoutError:
                if self._launcher.poll() is not None or time.monotonic() > deadline:
                    raise Crashed(self._last_words()) from None
                continue
            # The kernel tells the other end's process by its number here, which in a host of its own it does not know
            number, _, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            members.append(_Member(Connection(end.detach()), psutil.Process(number)))
        return members

    def _replies(self) -> list[Any]:
        deadline = time.monotonic() + _TURN_SECONDS
        replies = []
        for member in self._members:
            try:
                if not member.connection.poll(max(0.0, deadline - time.monotonic())):
                    raise Crashed(f"no answer within {_TURN_SECONDS:g} s; {self._last_words()}")
                replies.append(member.connection.recv())
            except (EOFError, ConnectionResetError):
                with contextlib.suppress(subprocess.TimeoutExpired):  # the launcher tells why
                    self._launcher.wait(_END_SECONDS)
                raise Crashed(self._last_words()) from None
        return replies

    def _suspend(self) -> None:
        for member in self._members:
            member.process.suspend()

    def _last_words(self) -> str:
        return cause_of_crash(self._log.read_text(encoding="utf-8", errors="replace").splitlines())


@dataclass(frozen=True)
class _Member:
    connection: Connection[Any, Any]
    process: psutil.Process


def cause_of_crash(log: Sequence[str]) -> str:
    """Of what a job that has crashed has printed, the line that tells why, as far as a program can see.

    That is the first one of an error: later ones are of ranks that have lost their fellow, and of the launcher.
    """
    lines = [line.strip() for line in log if line.strip() and not line.startswith("[W")]  # PyTorch's warnings
    errors = [line for line in lines if re.search(r"^[\w.]*(Error|Exception): |\berror: |what\(\):", line)]
    return (errors or lines[-1:] or ["it printed nothing"])[0]
