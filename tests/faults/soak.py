"""A job that lives under faults: `python tests/faults/soak.py --data DIR --minutes 30`.

Four ranks train with `comm.elastic` under a supervisor that starts them again, as a queue does, until the last step is
done. A fault comes every 20 s on average, drawn from a seed:

    kill        kill -9 of a rank; below two ranks the job saves and is started again
    suspend     SIGSTOP of a rank, SIGCONT up to three seconds later
    terminate   SIGTERM to a rank: the job saves, and is started again
    launcher    kill -9 of mpirun
    disk        the disk of the run is full for ten seconds (as root)
    flip        a bit of the newest checkpoint flips, and all ranks are killed

At the end the run must hold every step once, with the tokens and the curve of a run in which nothing has happened. The
yardstick for the curve is how far an undisturbed run of three ranks is from one of one rank: both add in other orders.
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
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("parallel", "ranks")]

from disks import flip_bit, small_disk  # noqa: E402
from jobs import command, losses, records  # noqa: E402
from launcher import Job, run, start  # noqa: E402

PACED = Path(__file__).with_name("paced.py")
MPIRUN = ["mpirun", "--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "-np"]
RANKS = 4
REST = 0.2  # seconds after each step
STEP = 0.27  # seconds with that rest, on two cores, about
INTERVAL = 20.0  # seconds from one fault to the next, on average
SETTINGS = {
    "comm__elastic": "true",
    "comm__min_ranks": 2,
    "comm__algorithm": "ring",
    "comm__timeout": 30,
    "checkpoint__every": "10s",
    "checkpoint__max_failures": 1000,
    "optimizer__lr": 0.001,
    "train__threads": 1,
}
WEIGHTS = {"kill": 10, "suspend": 3, "terminate": 2, "launcher": 2, "disk": 2, "flip": 1}


@dataclass
class Outcome:
    """What a soak has come to."""

    steps: int
    minutes: float
    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    worst: float = 0.0  # relative difference of a step's loss from the undisturbed run
    yardstick: float = 0.0  # the same of an undisturbed run of three ranks

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        return (
            f"{self.steps} steps in {self.minutes:.1f} minutes, {sum(self.faults.values())} faults ({kinds}), "
            f"{self.starts} starts; every step once, losses within {self.worst:.1e} (other numbers of ranks: "
            f"{self.yardstick:.1e})"
        )


def soak(data: Path, folder: Path, minutes: float, seed: int = 0) -> Outcome:
    """Raises AssertionError if a step is missing or there twice, or if the curve is another."""
    outcome = Outcome(steps=round(60 * minutes * 0.75 / STEP), minutes=0.0)  # a quarter goes on starting again
    run_dir = folder / "run"
    begin = time.monotonic()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if os.geteuid() else small_disk(run_dir.parent, "64m"):  # as root, one that can be filled
        job = _Supervised(data, run_dir, outcome)
        draw = random.Random(seed)
        next_fault = time.monotonic() + draw.expovariate(1 / INTERVAL)
        while job.goes_on():
            time.sleep(0.1)
            if time.monotonic() > next_fault:
                job.act(draw)
                next_fault = time.monotonic() + draw.expovariate(1 / INTERVAL)
            assert time.monotonic() - begin < 60 * minutes * 3 + 120, f"it gets nowhere: {outcome}\n{job.last_words()}"
        outcome.minutes = (time.monotonic() - begin) / 60
        _compare(data, folder, run_dir, outcome)
    return outcome


class _Supervised:
    """The job, started again until it is done."""

    def __init__(self, data: Path, run_dir: Path, outcome: Outcome) -> None:
        self._run_dir, self._outcome = run_dir, outcome
        options = {**SETTINGS, "train__steps": outcome.steps}
        words = command(data, run_dir, "--resume", "latest", **options)[1:]
        self._command = [*MPIRUN, str(RANKS), sys.executable, str(PACED), str(REST), *words]
        self._start()

    def goes_on(self) -> bool:
        """Starts the job again if it has ended before its last step; False once it is done."""
        status = self._job.process.poll()
        if status is None:
            return True
        _, left = psutil.wait_procs(self._job.members(), timeout=60)
        assert not left, f"processes are left: {left}\n{self.last_words()}"
        self._job.__exit__()
        if status == 0 and max(losses(self._run_dir)) == self._outcome.steps:
            return False
        self._start()
        return True

    def act(self, draw: random.Random) -> None:
        """One fault, if ranks train: one that dies while they start is a job that does not start."""
        (kind,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
        number = draw.random()
        ranks = self._job.ranks()
        metrics = self._run_dir / "metrics.jsonl"
        if not ranks or not metrics.exists() or metrics.stat().st_mtime < self._started + 1:
            return
        victim = ranks[int(number * len(ranks))]
        with suppress(psutil.Error):
            getattr(self, f"_{kind}")(victim, ranks)
            self._outcome.faults[kind] += 1

    def last_words(self) -> str:
        return "".join(self._lines[-60:])

    def _start(self) -> None:
        self._outcome.starts += 1
        self._started = time.time()
        self._lines: list[str] = []
        self._job: Job = start(self._command)
        stdout = self._job.process.stdout
        assert stdout is not None
        threading.Thread(target=self._lines.extend, args=(stdout,), daemon=True).start()

    def _kill(self, victim: psutil.Process, _: list[psutil.Process]) -> None:
        victim.kill()

    def _suspend(self, victim: psutil.Process, _: list[psutil.Process]) -> None:
        victim.suspend()
        threading.Timer(random.Random(victim.pid).uniform(0.5, 3), victim.resume).start()

    def _terminate(self, victim: psutil.Process, _: list[psutil.Process]) -> None:
        victim.send_signal(signal.SIGTERM)

    def _launcher(self, _: psutil.Process, __: list[psutil.Process]) -> None:
        self._job.process.kill()

    def _disk(self, _: psutil.Process, __: list[psutil.Process]) -> None:
        if os.geteuid():
            raise psutil.Error("no disk of its own")
        filler = self._run_dir.parent / "filler"
        filler.write_bytes(bytes(max(0, psutil.disk_usage(str(filler.parent)).free - (200 << 10))))
        threading.Timer(10, filler.unlink).start()

    def _flip(self, _: psutil.Process, ranks: list[psutil.Process]) -> None:
        saved = sorted((self._run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))
        if len(saved) < 2:
            raise psutil.Error("there is none before it")
        flip_bit(saved[-1] / "model.safetensors")
        for each in ranks:
            each.kill()


def _compare(data: Path, folder: Path, run_dir: Path, outcome: Outcome) -> None:
    """Each step is there once, with as many tokens as in an undisturbed run, and its loss."""
    with tempfile.TemporaryDirectory(prefix="hvdlm-soak-") as elsewhere:
        curves = []
        for ranks in (1, 3):
            other = Path(elsewhere, str(ranks), "run")
            options = {**SETTINGS, "comm__elastic": "false", "comm__min_ranks": 1, "checkpoint__every": 0}
            words = command(data, other, **options, train__steps=outcome.steps)
            result = run(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *words], deadline=3600)
            assert result.status == 0, result.output
            curves.append({int(str(each["step"])): each for each in records(other)})
    own = records(run_dir)
    assert [each["step"] for each in own] == list(range(1, outcome.steps + 1))
    whole, yardstick = curves
    assert [each["tokens"] for each in own] == [each["tokens"] for each in whole.values()]

    def difference(steps: dict[int, dict[str, object]]) -> float:
        pairs = ((float(str(steps[step]["loss"])), float(str(whole[step]["loss"]))) for step in whole)
        return max(abs(one / other - 1) for one, other in pairs)

    outcome.worst = difference({int(str(each["step"])): each for each in own})
    outcome.yardstick = difference(yardstick)
    assert outcome.worst <= max(1e-4, 3 * outcome.yardstick), str(outcome)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="of hvdlm prepare")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hvdlm-soak-") as directory:
        print(soak(options.data, Path(directory) / "disk", options.minutes, options.seed))
