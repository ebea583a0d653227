"""`hvdlm serve` and workers of it, for tests: processes of their own, as a user would start them."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from jobs import command, records, wait_for
from launcher import Job, launcher_command, start

LOGGED = Path(__file__).with_name("logged_servers.py")
SHARES = 3
DEADLINE = 120.0


def process_of(servers: Job, number: int) -> psutil.Process:
    """One of the servers that mpirun has started, or the job itself."""
    return (servers.ranks() or [psutil.Process(servers.process.pid)])[number]


class Served:
    """A server whose run directory is `run` in a folder. It logs what counts, in `log`."""

    def __init__(self, folder: Path, data: Path, *options: str, servers: int = 1, **settings: object) -> None:
        """`settings`: of the server, and unless `worker` is told others also of its workers. With several `servers`
        mpirun starts them.
        """
        self.folder, self.run, self._data, self._settings = folder, folder / "run", data, settings
        (folder / "log").mkdir(parents=True, exist_ok=True)
        (folder / "worker").mkdir(exist_ok=True)
        own: dict[str, object] = {"server__listen": "127.0.0.1:0", "server__max_staleness": 4, "server__shares": SHARES}
        words = command(data, self.run, *options, **{**settings, **own})[2:]
        said = len(self._listens())
        launcher = launcher_command("mpirun", servers) if servers > 1 else []
        self.job = start([*launcher, sys.executable, str(LOGGED), str(folder / "log"), "-", "serve", *words])
        self.wait_for_events("listens at", said + 1)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.job.__exit__()

    @property
    def address(self) -> str:
        found = re.search(r"listens at (\S+);", self._listens()[-1])
        assert found
        return found[1]

    def _listens(self) -> list[str]:
        return self.events("listens at") if (self.run / "metrics.jsonl").exists() else []

    def worker(self, fault: str = "-", token: str | None = None, **settings: object) -> Job:
        """`fault`: of logged_servers.py, of worker 0."""
        words = command(
            self._data,
            self.folder / "worker" / "run",
            **{**self._settings, "server__address": self.address, **settings},
        )[1:]
        token = (self.run / "token").read_text() if token is None else token
        program = [sys.executable, str(LOGGED), str(self.folder / "worker"), fault]
        return start([*program, *words], {"HVDLM_SERVER_TOKEN": token})

    def events(self, part: str) -> list[str]:
        """Those that the server has written so far, with `part` in them."""
        return [str(each["message"]) for each in records(self.run, "event") if part in str(each["message"])]

    def wait_for_events(self, part: str, count: int = 1) -> None:
        wait_for(
            lambda: (
                self.job.process.poll() is not None
                or ((self.run / "metrics.jsonl").exists() and len(self.events(part)) >= count)
            ),
            self.job,
        )
        if self.job.process.poll() is not None:
            raise AssertionError(f"the server has ended:\n{self.job.finish(DEADLINE).output}")

    def log(self, server: int = 0) -> Iterator[tuple[Any, ...]]:
        """What a server has done: records of logged_servers.py."""
        with (self.folder / "log" / str(server)).open("rb") as file:
            while file.peek(1):
                yield pickle.load(file)

    def tasks(self, kind: str) -> list[int]:
        """Those that counted ("ADD"), or were given back or came too late ("DROP")."""
        return [record[2] for record in self.log() if record[:2] == ("task", kind)]
