"""How long steps wait for data that lie on a slow file server, with `data.cache` and without.

    python benchmarks/shard_cache.py CONFIG DATA --rate 100mbit

Two emulated hosts: the ranks are on h1, the data set on h2, which h1 mounts by sshfs without the kernel's cache. Runs
of as many steps: without copies, with copies that the run makes, with those of the run before. Other settings of the
job follow, as for `hvdlm train`. Writes shard_cache.json and .md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.conditions import describe_run, describe_settings
from common.processes import FORWARDED_VARIABLES, environment, mpirun, on_host
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from common.setups import Setup, open_cluster
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.metrics import read_metrics

_DEADLINE = 1800  # seconds of a job
_SFTP_SERVER = "/usr/lib/openssh/sftp-server"
_LONG = 0.01  # seconds for which a step may wait and yet not be counted


def measure(options: argparse.Namespace) -> None:
    """All runs, then the table."""
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        open_cluster(Setup("hosts", 2, options.rate), fabric := Path(temporary) / "fabric"),
    ):
        mounted, cache = Path(temporary) / "mounted", Path(temporary) / "cache"
        mounted.mkdir()
        _run(fabric, "sshfs", f"h2:{options.data}", mounted, "-o", f"direct_io,ro,sftp_server={_SFTP_SERVER}")
        try:
            for name, directory in (("without", ""), ("makes copies", cache), ("finds copies", cache)):
                rows.append({"name": name, **_of_run(options, fabric, mounted, directory, Path(temporary) / name)})
                print(rows[-1], flush=True)
        finally:
            _run(fabric, "umount", "-l", mounted)
    data = DataSet(options.data)
    size = sum(shard.size for split in (data.train, data.validation) for shard in split.shards)
    config = load(options.config, [*options.settings, "--data.path", str(options.data)], PRESETS)
    facts = {
        "ranks": options.ranks,
        "rate": options.rate,
        "bytes_of_shards": size,
        "settings": describe_settings(config),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_results(options.output / "shard_cache.json", {**describe_run(), **facts, "rows": rows})
    head = [
        "run",
        "steps that waited",
        "s they waited in all",
        "last step that waited",
        "s a step, last half",
        "MB received",
    ]
    cells = [
        [
            row["name"],
            f"{row['steps_that_waited']} of {row['steps']}",
            f"{row['seconds_waited']:.1f}",
            str(row["last_that_waited"]),
            f"{row['seconds_of_a_step']:.3f}",
            f"{row['bytes_received'] / 1e6:,.0f}",
        ]
        for row in rows
    ]
    write_text(options.output / "shard_cache.md", text := markdown_table(head, cells))
    print(text)


def _of_run(
    options: argparse.Namespace, fabric: Path, mounted: Path, cache: Path | str, run_dir: Path
) -> dict[str, Any]:
    """What a job has waited for, and what has come to its host."""
    before = _received(fabric)
    launcher = [*mpirun(options.ranks), "--host", f"h1:{options.ranks}", *FORWARDED_VARIABLES]
    settings = {"data.path": mounted, "data.cache": cache, "train.run_dir": run_dir, "log.every": 1}
    program = [sys.executable, "-m", "hvdlm", "train", options.config]
    _run(fabric, *launcher, *program, *options.settings, *as_overrides(settings))
    steps = [each for each in read_metrics(run_dir / "metrics.jsonl") if each["kind"] == "train"]
    waited = [each for each in steps if each["data_seconds"] > _LONG]
    last_half = steps[len(steps) // 2 :]
    return {
        "steps": len(steps),
        "steps_that_waited": len(waited),
        "seconds_waited": sum(each["data_seconds"] for each in waited),
        "last_that_waited": waited[-1]["step"] if waited else 0,
        "seconds_of_a_step": sum(each["step_seconds"] for each in last_half) / len(last_half),
        "bytes_received": _received(fabric) - before,
    }


def _run(fabric: Path, *words: object) -> str:
    """The output of a command on h1."""
    inside = [*on_host(fabric, "h1"), *map(str, words)]
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open as long as what sshfs leaves running
        status = subprocess.run(inside, stdout=output, stderr=output, env=environment(), timeout=_DEADLINE).returncode
        output.seek(0)
        said = output.read()
    if status:
        raise HvdlmError(f"{' '.join(inside)} has failed: {said[-2000:]}")
    return said


def _received(fabric: Path) -> int:
    """Bytes that h1 has received from other hosts."""
    counters = [line.split(":") for line in _run(fabric, "cat", "/proc/self/net/dev").splitlines() if ":" in line]
    return sum(int(numbers.split()[0]) for name, numbers in counters if name.strip() != "lo")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("data", type=absolute_path)
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rate", default="100mbit", help="of each host's link; default: %(default)s")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, metavar="DIR")
    options, options.settings = parser.parse_known_args()
    measure(options)


if __name__ == "__main__":
    run_script(Path(__file__).name, _main)
