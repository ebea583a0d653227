"""Seconds from a command to the first step of its job, by what starts the ranks.

    python benchmarks/start_up.py CONFIG DATA --ranks 2 --rounds 3

In each round, in changing order, each way starts as many ranks on this machine: mpirun, horovodrun over Gloo, Ray and
Spark, which start a cluster here, too. Other settings of the job follow, as for `hvdlm train`. Prints each way's
median, its least and most, and what it takes more than mpirun in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common.conditions import describe_run
from common.processes import environment, hvdlm_command
from common.results import markdown_table
from common.script import absolute_path, as_overrides, run_script
from hvdlm.errors import HvdlmError
from hvdlm.training.metrics import read_metrics

_DEADLINE = 300  # seconds of a job
WAYS = ("mpirun", "horovodrun", "ray", "spark")


def measure(options: argparse.Namespace) -> None:
    """All rounds."""
    print(describe_run())
    found: dict[str, list[float]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.rounds):
            for way in sorted(found, reverse=bool(number % 2)):
                found[way].append(seconds_to_first_step(options, way, Path(temporary) / f"{way}_{number}"))
            print({way: round(each[-1], 1) for way, each in found.items()}, flush=True)
    rows = []
    for way, seconds in found.items():
        more = [own - other for own, other in zip(seconds, found["mpirun"], strict=True)]
        span = f"{min(seconds):.1f} to {max(seconds):.1f}"
        rows.append([way, f"{statistics.median(seconds):.1f} ({span})", f"{statistics.median(more):+.1f}"])
    print(markdown_table(["started by", "s to the first step", "more than mpirun"], rows))


def seconds_to_first_step(options: argparse.Namespace, way: str, run_dir: Path) -> float:
    """Of one job, which then goes on to its end."""
    settings = {"data.path": options.data, "train.run_dir": run_dir, "log.every": 1}
    own = [str(options.config), *options.settings, *as_overrides(settings)]
    train, ranks = [hvdlm_command(), "train", *own], str(options.ranks)
    command = {
        "mpirun": ["mpirun", "-np", ranks, "--oversubscribe", "--bind-to", "none", *train],
        "horovodrun": ["horovodrun", "--gloo", "-np", ranks, "-H", f"localhost:{ranks}", *train],
        "ray": [hvdlm_command(), "launch", "ray", "--ranks", ranks, "--address", "local", *own],
        "spark": [hvdlm_command(), "launch", "spark", "--ranks", ranks, "--address", f"local[{ranks}]", *own],
    }[way]
    log, metrics = run_dir.with_suffix(".log"), run_dir / "metrics.jsonl"
    with log.open("wb") as output:
        begin = time.monotonic()
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        while not (metrics.exists() and any(each["kind"] == "train" for each in read_metrics(metrics))):
            if process.poll() is not None or time.monotonic() > begin + _DEADLINE:
                process.kill()
                raise HvdlmError(f"{' '.join(command)} has come to no step: {log.read_text()[-1000:]}")
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        if process.wait(timeout=_DEADLINE):
            raise HvdlmError(f"{' '.join(command)} has failed: {log.read_text()[-1000:]}")
    return seconds


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("data", type=absolute_path)
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="beside mpirun; default: all")
    options, options.settings = parser.parse_known_args()
    options.ways = list(dict.fromkeys(["mpirun", *options.ways]))
    measure(options)


if __name__ == "__main__":
    run_script(Path(__file__).name, _main)
