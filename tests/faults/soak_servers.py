"""Serving processes whose workers are killed at random: `python tests/faults/soak_servers.py --data DIR --minutes 10`.

`hvdlm serve`, with --servers 2 as two ranks of mpirun, has three workers. A fault comes every 5 s on average, drawn
from a seed: mostly kill -9 of a worker, otherwise SIGTERM, or SIGSTOP and SIGCONT up to three seconds later. Whoever
has gone is replaced within two seconds. In the end a server gets SIGTERM. All shares of all batches that were made must
have counted once, on all servers in one order, and every step must be in the log once.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("parallel", "ranks")]

from jobs import command, losses, records  # noqa: E402
from launcher import Job, launcher_command, start  # noqa: E402
from served import process_of  # noqa: E402

from hvdlm.cli import main  # noqa: E402
from hvdlm.comm.mailbox import Letter  # noqa: E402
from hvdlm.strategies.server.following import FollowingServer  # noqa: E402
from hvdlm.strategies.server.group import Kind  # noqa: E402

WORKERS, SHARES = 3, 4
INTERVAL = 5.0  # seconds from one fault to the next, on average
DEADLINE = 120.0
WEIGHTS = {"kill": 8, "suspend": 1, "terminate": 1}
SETTINGS = {"train__steps": 10**6, "train__threads": 1, "checkpoint__every": "20s", "optimizer__lr": 0.001}
SERVE = "--serve"  # the first argument of a server's process


def serve(folder: Path, arguments: list[str]) -> int:
    """`hvdlm serve` that appends each task that counts to a file, of this server."""
    act, log = FollowingServer.act, folder / f"tasks-{os.environ.get('OMPI_COMM_WORLD_RANK', '0')}"

    def logged_act(own: FollowingServer, order: Letter) -> None:
        if order.kind == Kind.ADD:
            with log.open("a", encoding="utf-8") as file:
                print(order.header[1], file=file)
        act(own, order)

    FollowingServer.act = logged_act  # type: ignore[method-assign]
    return main(arguments)


class Soak:
    """Servers, their workers and what was done to them."""

    def __init__(self, data: Path, folder: Path, seed: int, servers: int) -> None:
        self.run_dir, self._data, self._folder, self._count = folder / "run", data, folder, servers
        self._random, self.faults = random.Random(seed), Counter[str]()
        own = {"server__listen": "127.0.0.1:0", "server__max_staleness": 4, "server__shares": SHARES}
        words = command(data, self.run_dir, **{**SETTINGS, **own})[1:]
        assert words[0] == "train"
        launcher = launcher_command("mpirun", servers) if servers > 1 else []
        self.servers = start([*launcher, sys.executable, __file__, SERVE, str(folder), "serve", *words[1:]])
        self._workers: list[Job] = []

    def go_on(self, seconds: float) -> None:
        """Does something to a worker now and then."""
        while not (listens := self._listens()):
            assert self.servers.process.poll() is None, self.servers.finish(DEADLINE).output
            time.sleep(0.2)
        address = listens[-1].partition("listens at ")[2].partition(";")[0]
        end, due = time.monotonic() + seconds, time.monotonic() + 10
        while time.monotonic() < end:
            for gone in [each for each in self._workers if each.process.poll() is not None]:
                gone.finish(DEADLINE)
                self._workers.remove(gone)
            while len(self._workers) < WORKERS:
                self._workers.append(self._start_worker(address))
            if time.monotonic() > due:
                due = time.monotonic() + self._random.expovariate(1 / INTERVAL)
                self._do(self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
            assert self.servers.process.poll() is None, self.servers.finish(DEADLINE).output
            time.sleep(0.5 + self._random.random())

    def _listens(self) -> list[str]:
        if not (self.run_dir / "metrics.jsonl").exists():
            return []
        return [str(each["message"]) for each in records(self.run_dir, "event") if "listens at" in str(each["message"])]

    def _start_worker(self, address: str) -> Job:
        words = command(self._data, self._folder / "worker", **{**SETTINGS, "server__address": address})
        return start(words, {"HVDLM_SERVER_TOKEN": (self.run_dir / "token").read_text()})

    def _do(self, fault: str) -> None:
        self.faults[fault] += 1
        process = self._random.choice(self._workers).process
        if fault == "suspend":
            process.send_signal(signal.SIGSTOP)
            threading.Timer(3 * self._random.random(), lambda: process.send_signal(signal.SIGCONT)).start()
        else:
            process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)

    def end(self) -> str:
        """Stops the servers, and says what was found. Raises AssertionError if a share did not count once."""
        process_of(self.servers, self._count - 1).send_signal(signal.SIGTERM)
        result = self.servers.finish(DEADLINE)
        assert result.status == 75, result.output
        for worker in self._workers:
            worker.process.send_signal(signal.SIGCONT)
            worker.finish(DEADLINE)
        orders = [
            (self._folder / f"tasks-{server}").read_text(encoding="utf-8").split() for server in range(self._count)
        ]
        assert all(order == orders[0] for order in orders)
        counted = Counter(map(int, orders[0]))
        steps = list(losses(self.run_dir))
        assert steps == list(range(1, len(steps) + 1))
        assert counted == Counter(range(len(steps) * SHARES)), counted - Counter(range(len(steps) * SHARES))
        again = sum("is handed out again" in str(each["message"]) for each in records(self.run_dir, "event"))
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        shares = f"{len(steps):,} steps, {sum(counted.values()):,} shares, each counted once"
        return f"{shares}; {faults}; {again} shares given back"


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        sys.exit(serve(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(options.data.absolute(), Path(temporary), options.seed, options.servers)
        soak.go_on(60 * options.minutes)
        print(soak.end())
