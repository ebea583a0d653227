"""Seconds from mpirun to the first step by how many ranks there are, and where they go.

    python benchmarks/first_step.py CONFIG DATA --ranks 8 16 32 64

Ranks are on emulated hosts, as many on each; passes are sleeps. Other settings of the job follow, as for `hvdlm train`.
More ranks than cores wait for each other's imports, so beside seconds stand those of a core that a rank has used: where
each rank has a core, these are the seconds. A line through them says what more ranks would take. Writes first_step.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.conditions import describe_run, describe_settings
from common.processes import FORWARDED_VARIABLES, environment, mpirun, on_host
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from common.setups import Setup, open_cluster
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS

_DEADLINE = 900  # seconds of a job
_RANK = Path(__file__).with_name("first_step") / "rank.py"


def measure(options: argparse.Namespace) -> None:
    """All jobs, then the table and the line."""
    found: dict[int, list[list[dict[str, list[float]]]]] = {ranks: [] for ranks in options.ranks}
    with (
        tempfile.TemporaryDirectory() as temporary,
        open_cluster(Setup("hosts", options.hosts, options.rate), fabric := Path(temporary) / "fabric"),
    ):
        for number in range(options.rounds):
            for ranks in options.ranks[:: -1 if number % 2 else 1]:
                directory = Path(temporary) / f"{ranks}_{number}"
                directory.mkdir()
                found[ranks].append(notes_of_job(options, fabric, ranks, directory))
                last = max(rank["first step"][0] for rank in found[ranks][-1])
                print(f"{ranks} ranks: {last:.1f} s", flush=True)
    rows = {ranks: [phases(job) for job in jobs] for ranks, jobs in found.items()}
    medians = {ranks: median_of(each) for ranks, each in rows.items()}
    lines = {phase: line(medians, phase) for phase in next(iter(medians.values()))}
    config = load(options.config, [*options.settings, "--data.path", str(options.data)], PRESETS)
    facts = {
        "hosts": options.hosts,
        "rate": options.rate,
        "cores": os.cpu_count(),
        "settings": describe_settings(config),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_results(options.output / "first_step.json", {**describe_run(), **facts, "rows": rows, "core_seconds": lines})
    write_text(options.output / "first_step.md", text := as_table(medians, lines, options.expected))
    print(text)


def notes_of_job(
    options: argparse.Namespace, fabric: Path, ranks: int, directory: Path
) -> list[dict[str, list[float]]]:
    """What each rank of one job has noted, by rank."""
    hosts = ",".join(f"h{number + 1}:{ranks // options.hosts}" for number in range(options.hosts))
    settings = {
        "data.path": options.data,
        "train.run_dir": directory / "run",
        "train.steps": 3,
        "optimizer.warmup_steps": 0,
    }
    command = [*on_host(fabric, "h1"), *mpirun(ranks), "--host", hosts, *FORWARDED_VARIABLES, sys.executable]
    arguments = [str(_RANK), str(directory), "train", str(options.config), *options.settings, *as_overrides(settings)]
    with (directory / "log").open("w+b") as log:
        done = subprocess.run(
            [*command, *arguments], env=environment(), stdout=log, stderr=subprocess.STDOUT, timeout=_DEADLINE
        )
        log.seek(0)
        said = log.read().decode(errors="replace")
    if done.returncode:
        raise HvdlmError(f"{ranks} ranks have failed: {said[-2000:]}")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]


def phases(job: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Of each phase: seconds until the last rank has ended it, and of a core, of rank 0 and the mean of all, in it."""
    rows = {}
    before = [0.0] * len(job)
    for phase in job[0]:
        used = [rank[phase][1] - earlier for rank, earlier in zip(job, before, strict=True)]
        before = [rank[phase][1] for rank in job]
        rows[phase] = {
            "until": max(rank[phase][0] for rank in job),
            "core_of_rank_0": used[0],
            "core": statistics.fmean(used),
        }
    return rows


def median_of(jobs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each number."""
    return {
        phase: {key: statistics.median(job[phase][key] for job in jobs) for key in row}
        for phase, row in jobs[0].items()
    }


def line(medians: dict[int, dict[str, dict[str, float]]], phase: str) -> tuple[float, float]:
    """Core seconds of rank 0 in a phase with no other rank, and what each more rank adds: least squares.

    The first phase, in which ranks do not know of each other, does not grow.
    """
    seconds = [each[phase]["core_of_rank_0"] for each in medians.values()]
    if phase == next(iter(next(iter(medians.values())))):
        return statistics.fmean(seconds), 0.0
    slope, constant = np.polyfit(list(medians), seconds, 1)
    return float(constant), float(slope)


def as_table(
    medians: dict[int, dict[str, dict[str, float]]], lines: dict[str, tuple[float, float]], expected: int
) -> str:
    """Seconds until each phase has ended everywhere, of a core in it of rank 0 and the mean, and what is expected."""
    head = ["phase", *(f"{ranks} ranks" for ranks in medians), "a rank more adds to rank 0", f"{expected} ranks"]
    rows: list[Sequence[Any]] = []
    for phase, (constant, slope) in lines.items():
        cells = [
            f"{row['until']:.1f} ({row['core_of_rank_0']:.2f}, {row['core']:.2f})"
            for row in (each[phase] for each in medians.values())
        ]
        rows.append([phase, *cells, f"{1e3 * slope:.2f} ms", f"{constant + slope * expected:.2f}"])
    total = sum(constant + slope * expected for constant, slope in lines.values())
    rows.append(
        [
            "all",
            *(
                f"({sum(row['core_of_rank_0'] for row in each.values()):.2f}, "
                f"{sum(row['core'] for row in each.values()):.2f})"
                for each in medians.values()
            ),
            f"{1e3 * sum(slope for _, slope in lines.values()):.2f} ms",
            f"{total:.2f}",
        ]
    )
    return markdown_table(head, rows)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("data", type=absolute_path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="default: %(default)s")
    parser.add_argument("--hosts", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rate", default="1gbit", help="of each host's link; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--expected", type=int, default=2048, metavar="RANKS", help="to draw the line to")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, metavar="DIR")
    options, options.settings = parser.parse_known_args()
    if any(ranks % options.hosts for ranks in options.ranks):
        raise HvdlmError(f"--ranks: as many ranks are on each of {options.hosts} hosts")
    measure(options)


if __name__ == "__main__":
    run_script(Path(__file__).name, _main)
