"""Forecasts of layouts by `hvdlm predict` beside steps that are measured on this machine.

    python benchmarks/layouts.py --data data/python-stdlib
    python benchmarks/layouts.py --data data/python-stdlib --setup one-host 2x1gbit --quick

All layouts, and one rank alone, are measured round by round as compare.py does it, on one host and on emulated ones
(as root). A forecast knows one rank's tokens/s in the same round and the rate of the link; on one host, which has none,
what allreduce.py measures there before the rounds. Writes layouts.json and layouts.md; benchmarks/README.md defines the
figures. Any setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.conditions import describe_run, describe_settings
from common.processes import environment
from common.results import read_results, write_results, write_text
from common.script import run_script
from common.setups import ONE_HOST, Setup, available_setups, open_cluster, parse_setup
from compare.compared_model import configure
from compare.measurement import SystemResult
from compare.options import add_rounds, measuring_parser, parse
from compare.registry import LIMIT, group_systems
from compare.runner import measure_setup
from compare.summary import find_problems
from hvdlm.cores import usable_cores
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.scaling.cluster import LINK_SHARE
from layouts.layout_rows import as_record, make_rows, table

SETUPS = (ONE_HOST, "2x10gbit", "2x1gbit", "2x100mbit")
METHODS = ("none", "zero1", "zero2", "zero3", "tensor", "pipeline")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures each set-up, and writes its results before the next one starts."""
    setups = available_setups([parse_setup(name, options.ranks) for name in options.setup])
    for setup in setups:
        if setup.ranks > usable_cores():
            raise HvdlmError(
                f"{setup.name} has more ranks than the {usable_cores()} cores here, which would take turns: leave it "
                "out of --setup"
            )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "layouts.json"
    results, problems = read_results(path), []
    for setup in setups:
        config = configure(options.data, setup.ranks * options.micro_batches, overrides)
        inside_link = None if setup.rate else measure_link(setup)
        measured = measure_setup(
            setup, group_systems(options.methods, ["mpi"], []), config, options.rounds, options.steps
        )
        rows = make_rows(options.methods, measured, config, DataSet(options.data).vocab_size, setup, inside_link)
        tokens = config.train.global_batch_size // setup.ranks * config.model.context_length
        results[setup.name] = {
            **describe_run(),
            "setup": asdict(setup),
            "settings": {
                **describe_settings(config),
                **{name: getattr(options, name) for name in ("rounds", "steps", "micro_batches")},
            },
            "inside_link": inside_link,
            "tokens_per_second": tokens / _median_seconds(measured),
            **as_record(rows),
            "systems": [asdict(result) for result in measured],
        }
        write_results(path, results)
        write_text(options.output / "layouts.md", table(results))
        problems += [f"{setup.name}: {sentence}" for sentence in find_problems(measured)]
    print(table(results))
    if problems:
        raise HvdlmError("do not use these figures: " + "; ".join(problems))


def measure_link(setup: Setup) -> str:
    """The rate of which `hvdlm predict` takes the share that a link carries, so that it is what engine mpi attains."""
    with (
        tempfile.TemporaryDirectory(prefix="hvdlm-layouts-") as directory,
        open_cluster(setup, Path(directory)) as cluster,
    ):
        script = [
            sys.executable,
            str(Path(__file__).with_name("allreduce.py")),
            "--engines",
            "mpi",
            "--output",
            directory,
        ]
        sizes = ["--smallest", "16mb", "--largest", "16mb", "--dtypes", "float32"]
        subprocess.run([*cluster.launcher, *script, *sizes], env=environment(), stdout=subprocess.DEVNULL, check=True)
        found = json.loads(Path(directory, "allreduce-results.json").read_text(encoding="utf-8"))
    (attained,) = (row["bus_bandwidth"] for row in found["rows"] if row["way"] == "hvdlm mpi")
    return f"{round(8 * attained / LINK_SHARE / 1e6)}mbit"


def _median_seconds(measured: Sequence[SystemResult]) -> float:
    (limit,) = (result for result in measured if result.name == LIMIT)
    return statistics.median(each.step_seconds for each in limit.measurements if each)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = measuring_parser(__doc__, SETUPS)
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help=f"as --codecs of compare.py (default: {' '.join(METHODS)})"
    )
    add_rounds(parser, micro_batches=4, rounds=10, steps=3)
    return parse(parser, quick=(3, 1))


if __name__ == "__main__":
    run_script("layouts.py", lambda: run(*_parse()))
