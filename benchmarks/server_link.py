"""Synchronous parameter servers beside all-reduce, on hosts whose links have a given rate.

    python benchmarks/server_link.py CONFIG DATA --workers 4 --servers 2 --rate 1gbit

Emulated hosts of one rank each: workers first, then servers. In each round, and in changing order, the workers train by
all-reduce while the servers' hosts do nothing, then with servers. Prints tokens/s, and the ratio within rounds. Other
settings of the job follow, as for `hvdlm train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.conditions import describe_run
from common.script import absolute_path, as_overrides, run_script
from common.setups import Cluster, Setup, open_cluster
from hvdlm.errors import HvdlmError

_DEADLINE = 600  # seconds of a job
_WARM_UP = 5  # steps


def tokens_per_second(options: argparse.Namespace, cluster: Cluster, servers: int, run_dir: Path) -> float:
    """Of a job to its end, by the median of its steps. Raises HvdlmError if it fails."""
    launcher = list(cluster.launcher)
    launcher[launcher.index("-np") + 1] = str(options.workers + servers)
    settings = {"data.path": options.data, "train.run_dir": run_dir, "log.every": 1, "server.ranks": servers}
    settings |= {"train.steps": options.steps, "train.evaluate_sequences": 1, "comm.engine": "mpi"}
    words = [sys.executable, "-m", "hvdlm", "train", str(options.config), *options.settings, *as_overrides(settings)]
    result = subprocess.run([*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_DEADLINE)
    if result.returncode:
        raise HvdlmError(f"{' '.join(words)} has failed: {result.stdout.decode()[-2000:]}")
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [each for each in records if each["kind"] == "train"][_WARM_UP:]
    tokens = steps[-1]["tokens"] / steps[-1]["step"]
    return float(tokens / statistics.median(each["step_seconds"] for each in steps))


def measure(options: argparse.Namespace) -> None:
    """All rounds."""
    print(describe_run())
    setup = Setup("hosts", options.workers + options.servers, options.rate)
    found: dict[int, list[float]] = {0: [], options.servers: []}
    with tempfile.TemporaryDirectory() as temporary, open_cluster(setup, Path(temporary) / "fabric") as cluster:
        for number in range(options.rounds):
            for servers in sorted(found, reverse=bool(number % 2)):
                run_dir = Path(temporary) / f"{number}_{servers}"
                found[servers].append(tokens_per_second(options, cluster, servers, run_dir))
            rates = found[0][-1], found[options.servers][-1]
            print(f"round {number}: all-reduce {rates[0]:,.0f}, servers {rates[1]:,.0f} tokens/s", flush=True)
    ratios = [own / other for own, other in zip(found[options.servers], found[0], strict=True)]
    ranks = f"{options.workers} workers and {options.servers} servers at {options.rate}"
    print(f"{ranks}: {statistics.median(ratios):.3f} of all-reduce ({min(ratios):.3f} to {max(ratios):.3f})")


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("config", type=absolute_path, help="TOML file of the model")
    parser.add_argument("data", type=absolute_path, help="data set")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--rate", default="1gbit", help="of each host's link")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    options, options.settings = parser.parse_known_args(words)
    return options


if __name__ == "__main__":
    run_script("server_link.py", lambda: measure(parse(sys.argv[1:])))
