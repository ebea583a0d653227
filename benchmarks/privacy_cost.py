"""What differential privacy adds to a step, of hvdlm and of Opacus: seconds and memory.

    python benchmarks/privacy_cost.py CONFIG

Each system takes the steps of one process on one rank: hvdlm and PyTorch without privacy, hvdlm with it, and Opacus's
two ways, per-sample gradients by hooks and ghost clipping, on PyTorch's model. Every figure is divided by that of the
same toolkit without privacy in the same round, and rounds change the order. Any setting can be overridden as for `hvdlm
train`, by --section.key value. Needs the extras `privacy` and `opacus`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.conditions import describe_run, describe_settings
from common.processes import environment
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError, check_installed
from hvdlm.model.presets import PRESETS
from privacy_cost.private_systems import SYSTEMS, make_step

_FORMS = {"seconds": ("{:.3f}", 1.0), "memory": ("{:,.0f}", 2.0**20)}
_WARM_UP = 2  # steps
_DEADLINE = 900  # seconds of a system
_FIXED = as_overrides(
    {
        "privacy.clip_norm": 1.0,
        "privacy.noise_multiplier": 1.0,
        "privacy.secure": "false",
        "privacy.delta": 1e-9,
        "log.every": 10**6,
        "train.check_replicas_every": 0,
        "model.position": "learned",
    }
)


def measure_one(name: str, config: Config, vocab_size: int, steps: int) -> None:
    """In a process of its own: prints the median seconds of a step, and bytes beyond those before the model."""
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(name, config, vocab_size)
    seconds = []
    for _ in range(_WARM_UP + steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"seconds": statistics.median(seconds[_WARM_UP:]), "memory": memory}))


def measure(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """All rounds, then the table."""
    check_installed("opacus", "benchmarks/privacy_cost.py", "Opacus", "opacus")
    config = load(options.config, [*_FIXED, *overrides], PRESETS)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    for number in range(options.rounds):
        for name in list(SYSTEMS)[:: -1 if number % 2 else 1]:
            found[name].append(_run(name, options, overrides))
    rows = []
    for name, base in SYSTEMS.items():
        ratios = {
            kind: [own[kind] / other[kind] for own, other in zip(found[name], found[base], strict=True)]
            for kind in ("seconds", "memory")
        }
        rows.append({"system": name, "base": base, "rounds": found[name], "ratios": ratios})
    results = {**describe_run("opacus", "dp-accounting"), "settings": describe_settings(config), "rows": rows}
    write_results(options.output / "privacy_cost.json", {**results, "vocab_size": options.vocab_size})
    cells = [
        [row["system"], *(cell for kind, form in _FORMS.items() for cell in _cells(row, kind, *form))] for row in rows
    ]
    columns = ["system", "seconds a step", "over that without privacy", "MiB", "over those without privacy"]
    text = markdown_table(columns, cells)
    write_text(options.output / "privacy_cost.md", text)
    print(text)


def _run(name: str, options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, float]:
    words = [str(options.config), "--one", name, "--vocab-size", str(options.vocab_size), "--steps", str(options.steps)]
    command = [sys.executable, __file__, *words, *overrides]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=_DEADLINE)
    if done.returncode:
        raise HvdlmError(f"{name} has failed: {done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _cells(row: Mapping[str, Any], kind: str, form: str, unit: float) -> tuple[str, str]:
    """The median of all rounds, and that of their ratios with the least and the most."""
    ratios = row["ratios"][kind]
    value = statistics.median(each[kind] for each in row["rounds"]) / unit
    return form.format(value), f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="of a system in a round (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens in the vocabulary (default: %(default)s)")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, metavar="DIR")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.one:
        config = load(options.config, [*_FIXED, *overrides], PRESETS)
        measure_one(options.one, config, options.vocab_size, options.steps)
    else:
        measure(options, overrides)


if __name__ == "__main__":
    run_script(Path(__file__).name, _main)
