"""Asynchronous parameter servers with one slow worker: how much of the workers' own speeds is left, and at which loss.

    python benchmarks/parameter_server.py CONFIG DATA --workers 4 --share 0.25 --seeds 0 1 2
    python benchmarks/parameter_server.py CONFIG DATA --simulate 4000

In each round, and in changing order: every worker alone, all at once (their own speeds, under the same load of the
machine); workers and servers that do not wait for one another, for each way of correcting what is
late; the same that wait in each step. The last worker is stopped by SIGSTOP for all but `--share` of each tenth of a
second. Prints tokens/s over the sum of the workers' own speeds in the same round, and validation losses after as many
tokens. With `--simulate` passes are sleeps of a worker of so many tokens/s, the last one of a share of that: for more
workers than cores; losses then mean nothing. Other settings of the job follow, as for `hvdlm train`.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from common.conditions import describe_run
from common.processes import SIMULATED_TRAIN, environment
from common.script import absolute_path, as_overrides, run_script
from hvdlm.errors import HvdlmError

_PERIOD = 0.1  # seconds of one stop and one go
_DEADLINE = 3600  # seconds of a job

# Ways of correcting what is late
CORRECTIONS = ("none", "warm-up", "prediction", "both")


class DutyCycle:
    """A process that runs for a share of the time only."""

    def __init__(self, process: psutil.Process, share: float) -> None:
        self._process, self._share = process, share
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._process.send_signal(signal.SIGSTOP)
                self._is_over.wait(_PERIOD * (1 - self._share))
                self._process.send_signal(signal.SIGCONT)
                self._is_over.wait(_PERIOD * self._share)
        except psutil.NoSuchProcess:
            pass


def rank_process(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of a rank that mpirun has started. Raises HvdlmError if there is none."""
    end = time.monotonic() + 60
    while time.monotonic() < end and launcher.poll() is None:
        for each in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if each.environ().get("OMPI_COMM_WORLD_RANK") == str(rank) and not each.children():
                    return each
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise HvdlmError(f"mpirun has started no rank {rank}")


def train(
    options: argparse.Namespace, ranks: int, slow: int | None, settings: dict[str, object], run_dir: Path
) -> None:
    """A job to its end, whose rank `slow` has a duty cycle once the first step is done."""
    settings = {**settings, "data.path": options.data, "train.run_dir": run_dir, "log.every": 1}
    speeds = [options.simulate] * ranks
    if slow is not None:
        speeds[slow] *= options.share
    program = [str(SIMULATED_TRAIN), ",".join(map(str, speeds))] if options.simulate else ["-m", "hvdlm"]
    words = [sys.executable, *program, "train", str(options.config), *options.settings, *as_overrides(settings)]
    launcher = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"] if ranks > 1 else []
    with (run_dir.parent / f"{run_dir.name}.txt").open("wb") as output:
        process = subprocess.Popen([*launcher, *words], env=environment(), stdout=output, stderr=subprocess.STDOUT)
        cycle = None
        try:
            if slow is not None and not options.simulate:
                victim = rank_process(process, slow) if launcher else psutil.Process(process.pid)
                while process.poll() is None and not lines(run_dir):
                    time.sleep(0.05)
                cycle = DutyCycle(victim, options.share)
            if process.wait(timeout=_DEADLINE):
                raise HvdlmError(f"{' '.join(words)} has failed: see {output.name}")
        finally:
            if cycle is not None:
                cycle.end()
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)


def lines(run_dir: Path, kind: str = "train") -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    found = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if path.exists() else []
    return [record for record in map(json.loads, found) if record["kind"] == kind]


def speed(run_dir: Path) -> float:
    """Tokens a second over the second half of the steps: by then the duty cycle has begun."""
    steps = lines(run_dir)[len(lines(run_dir)) // 2 :]
    seconds = sum(each["step_seconds"] for each in steps)
    return (steps[-1]["tokens"] - steps[0]["tokens"]) / seconds * len(steps) / max(1, len(steps) - 1)


def own_speeds(options: argparse.Namespace, seed: int, directory: Path) -> float:
    """The sum over workers that each train alone, all at once."""
    steps = max(8, options.steps // options.workers)  # of whole batches: as much of an optimizer's work for each token
    settings: dict[str, object] = {"train.global_batch_size": options.batch, "train.steps": steps, "train.seed": seed}
    threads, failures = [], list[Exception]()

    def alone(worker: int) -> None:
        try:
            slow = 0 if worker == options.workers - 1 else None
            train(options, 1, slow, settings, directory / f"alone_{worker}")
        except Exception as error:
            failures.append(error)

    for worker in range(options.workers):
        threads.append(threading.Thread(target=alone, args=(worker,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(speed(directory / f"alone_{worker}") for worker in range(options.workers))


def corrected(name: str, options: argparse.Namespace) -> dict[str, object]:
    """The settings of a correction; a warm-up is a quarter of the steps."""
    warmup_steps = options.steps // 4 if name in ("warm-up", "both") else 0
    return {
        "server.max_staleness": options.staleness,
        "server.warmup_steps": warmup_steps,
        "server.predict": str(name in ("prediction", "both")).lower(),
    }


def measure(options: argparse.Namespace) -> None:
    """All rounds; a seed each."""
    print(describe_run())
    ratios: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, object]] = {"synchronous": {"server.max_staleness": 0}}
    kinds |= {name: corrected(name, options) for name in options.corrections}
    with tempfile.TemporaryDirectory() as temporary:
        for number, seed in enumerate(options.seeds):
            directory = Path(temporary) / str(seed)
            directory.mkdir()
            alone = own_speeds(options, seed, directory)
            names = list(kinds) if number % 2 else list(reversed(kinds))
            for name in names:
                settings: dict[str, object] = {"train.global_batch_size": options.batch, "train.steps": options.steps}
                settings |= {"train.seed": seed, "server.ranks": options.servers, **kinds[name]}
                run_dir = directory / name.replace(" ", "_")
                train(options, options.workers + options.servers, options.workers - 1, settings, run_dir)
                ratios.setdefault(name, []).append(speed(run_dir) / alone)
                losses.setdefault(name, []).append(lines(run_dir, "eval")[-1]["loss"])
                dropped = lines(run_dir)[-1].get("dropped", 0.0)
                ages = statistics.mean(each.get("staleness", 0.0) for each in lines(run_dir))
                print(
                    f"seed {seed}, {name}: {ratios[name][-1]:.3f} of {alone:,.0f} tokens/s, validation loss "
                    f"{losses[name][-1]:.4f}, mean age {ages:.2f} steps, {dropped:.0f} shares too late",
                    flush=True,
                )
    for name in kinds:
        change = [own / other - 1 for own, other in zip(losses[name], losses["synchronous"], strict=True)]
        print(
            f"{name}: {statistics.median(ratios[name]):.3f} of the workers' own speeds ({min(ratios[name]):.3f} to "
            f"{max(ratios[name]):.3f}), loss {100 * statistics.mean(change):+.2f}% of synchronous "
            f"({100 * min(change):+.2f} to {100 * max(change):+.2f})"
        )


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("config", type=absolute_path, help="TOML file of the model")
    parser.add_argument("data", type=absolute_path, help="data set")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.25, help="of the time in which the last worker runs")
    parser.add_argument("--simulate", type=float, default=0, metavar="TOKENS", help="a second, of a worker")
    parser.add_argument("--staleness", type=int, default=4, help="server.max_staleness")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a global batch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corrections", nargs="+", choices=CORRECTIONS, default=list(CORRECTIONS))
    options, options.settings = parser.parse_known_args(words)
    return options


if __name__ == "__main__":
    run_script("parameter_server.py", lambda: measure(parse(sys.argv[1:])))
