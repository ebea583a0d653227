"""Synchronous parameter servers beside all-reduce, on hosts whose links have a given rate.

    python benchmarks/server_link.py CONFIG DATA --workers 4 --servers 1 2 4 --rate 1gbit
    python benchmarks/server_link.py CONFIG DATA --servers 1 2 4 8 --rate 200mbit --simulate 400

Emulated hosts of one rank each: workers first, then servers. In each round, and in changing order, the workers train by
all-reduce while the servers' hosts do nothing, then with each number of servers. With `--simulate` passes are sleeps of
a worker of so many tokens/s, so that workers and servers do not wait for the cores of this machine. Other settings of
the job follow, as for `hvdlm train`. Writes server_link.json, .md and .png; a job of the same model, workers, rate and
speed is replaced, others stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.conditions import describe_run, describe_settings
from common.processes import SIMULATED_TRAIN
from common.results import read_results, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from common.setups import Cluster, Setup, open_cluster
from hvdlm.comm.rate import parse_rate
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import parameter_count
from server_link.link_seconds import Job, all_reduce_seconds, server_seconds
from server_link.server_figures import draw, table

_DEADLINE = 600  # seconds of a job
_WARM_UP = 5  # steps


def tokens_per_second(options: argparse.Namespace, cluster: Cluster, servers: int, run_dir: Path) -> float:
    """Of a job to its end, by the median of its steps. Raises HvdlmError if it fails."""
    ranks = options.workers + servers
    launcher = list(cluster.launcher)
    launcher[launcher.index("-np") + 1] = str(ranks)
    settings = {"data.path": options.data, "train.run_dir": run_dir, "log.every": 1, "server.ranks": servers}
    settings |= {"train.steps": options.steps, "train.evaluate_sequences": 1, "comm.engine": "mpi"}
    settings["optimizer.warmup_steps"] = 0  # so few steps have none
    program = [str(SIMULATED_TRAIN), ",".join([str(options.simulate)] * ranks)] if options.simulate else ["-m", "hvdlm"]
    words = [sys.executable, *program, "train", str(options.config), *options.settings, *as_overrides(settings)]
    result = subprocess.run([*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_DEADLINE)
    if result.returncode:
        raise HvdlmError(f"{' '.join(words)} has failed: {result.stdout.decode()[-2000:]}")
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [each for each in records if each["kind"] == "train"][_WARM_UP:]
    tokens = steps[-1]["tokens"] / steps[-1]["step"]
    return float(tokens / statistics.median(each["step_seconds"] for each in steps))


def measure(options: argparse.Namespace) -> None:
    """All rounds, then table and picture."""
    setup = Setup("hosts", options.workers + max(options.servers), options.rate)
    found: dict[int, list[float]] = {servers: [] for servers in (0, *options.servers)}
    with tempfile.TemporaryDirectory() as temporary, open_cluster(setup, Path(temporary) / "fabric") as cluster:
        for number in range(options.rounds):
            for servers in sorted(found, reverse=bool(number % 2)):
                run_dir = Path(temporary) / f"{number}_{servers}"
                found[servers].append(tokens_per_second(options, cluster, servers, run_dir))
            rates = ", ".join(f"{servers} servers {rates[-1]:,.0f}" for servers, rates in found.items())
            print(f"round {number}, tokens/s: {rates}", flush=True)
    config = load(options.config, [*options.settings, "--data.path", str(options.data)], PRESETS)
    job = links_of(config, options) if options.simulate else None
    path = options.output / "server_link.json"
    options.output.mkdir(parents=True, exist_ok=True)
    passes = f"passes of {options.simulate:g} tokens/s" if options.simulate else "computing"
    name = f"{options.workers} workers, {options.rate}, {passes}"
    rows = [row(servers, found, job) for servers in options.servers]
    results = {
        **read_results(path),
        name: {
            **describe_run(),
            "settings": {**describe_settings(config), "rounds": options.rounds},
            "all_reduce_tokens_per_second": statistics.median(found[0]),
            "rows": rows,
        },
    }
    write_results(path, results)
    write_text(path.with_suffix(".md"), table(results))
    draw(results, path.with_suffix(".png"))
    print(table(results))


def row(servers: int, found: Mapping[int, list[float]], job: Job | None) -> dict[str, Any]:
    """Of the table: the median of ratios within rounds."""
    ratios = [own / other for own, other in zip(found[servers], found[0], strict=True)]
    return {
        "servers": servers,
        "tokens_per_second": statistics.median(found[servers]),
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "links": None if job is None else all_reduce_seconds(job) / server_seconds(job, servers),
    }


def links_of(config: Config, options: argparse.Namespace) -> Job:
    """What simulated workers compute and send in a step; all numbers travel in float32."""
    tokens = config.train.global_batch_size * config.model.context_length / options.workers
    parameters = parameter_count(config.model, DataSet(options.data).vocab_size)
    return Job(options.workers, tokens / options.simulate, 4.0 * parameters, parse_rate(options.rate) / 8)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("config", type=absolute_path, help="TOML file of the model")
    parser.add_argument("data", type=absolute_path, help="data set")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rate", default="1gbit", help="of each host's link")
    parser.add_argument("--simulate", type=float, default=0, metavar="TOKENS", help="a second, of a worker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    options, options.settings = parser.parse_known_args(words)
    return options


if __name__ == "__main__":
    run_script("server_link.py", lambda: measure(parse(sys.argv[1:])))
