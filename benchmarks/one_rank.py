"""How fast one rank trains on its hardware: hvdlm by precision and compilation, and a GPT in plain PyTorch.

    python benchmarks/one_rank.py --data data/python-stdlib

Trains each model without communication, every system in a process of its own, measured round by round, and writes
one_rank.json and one_rank.md; benchmarks/README.md defines the figures. Any setting can be overridden as for `hvdlm
train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence

import torch

from common.conditions import describe_run, describe_settings
from common.results import read_results, write_results, write_text
from common.script import RESULTS, absolute_path, run_script
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from one_rank.configurations import MODELS, SYSTEMS, configure
from one_rank.process import SystemProcess
from one_rank.rows import SystemResult, make_row, table


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures each model, and writes its results before the next one starts."""
    results = read_results(options.output / "one_rank.json")
    options.output.mkdir(parents=True, exist_ok=True)
    vocab_size = DataSet(options.data).vocab_size
    for model in options.models:
        configs = {
            system: configure(model, system, options.data, options.threads, overrides) for system in options.systems
        }
        with tempfile.TemporaryDirectory(prefix="hvdlm-one-rank-") as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that the first compilation is a cold one
            measured = _measure(configs, options.rounds, options.steps)
        results[model] = {
            **describe_run(),
            "settings": {
                "rounds": options.rounds,
                "steps": options.steps,
                **describe_settings(next(iter(configs.values())), "precision", "compile"),
            },
            "rows": [make_row(name, measured, vocab_size) for name in measured],
        }
        write_results(options.output / "one_rank.json", results)
        write_text(options.output / "one_rank.md", table(results))
        print(table({model: results[model]}))


def _measure(configs: dict[str, Config], rounds: int, steps: int) -> dict[str, SystemResult]:
    """All systems round by round, in an order that rotates; on a GPU, whose memory would not hold all, one by one."""
    on_gpu = torch.cuda.is_available() and all(config.train.device != "cpu" for config in configs.values())
    results: dict[str, SystemResult] = {}
    for names in [[name] for name in configs] if on_gpu else [list(configs)]:
        processes: dict[str, SystemProcess] = {}
        try:
            for name in names:
                processes[name], results[name] = _start(name, configs[name])
            for number in range(rounds):
                shift = number % len(names)
                for name in names[shift:] + names[:shift]:
                    results[name].step_times.append(processes[name].measure(steps))
        finally:
            for process in processes.values():
                process.end()
    return results


def _start(name: str, config: Config) -> tuple[SystemProcess, SystemResult]:
    """A system's process after its first step. A compiled system is started twice, first with an empty cache."""
    cold = None
    if config.train.compile:
        first = SystemProcess(name, config, SYSTEMS[name].is_plain)
        cold = first.first_step_seconds
        first.end()
    process = SystemProcess(name, config, SYSTEMS[name].is_plain)
    return process, SystemResult(config, process.first_step_seconds, cold, process.start)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="a data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument("--models", nargs="+", default=["gpt-10m", "gpt-10m-50k"], choices=list(MODELS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one per core")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each system in a round")
    options, overrides = parser.parse_known_args()
    if options.rounds < 1 or options.steps < 1 or options.threads < 0:
        raise HvdlmError("give 1 or more --rounds and --steps, and 0 or more --threads")
    return options, overrides


if __name__ == "__main__":
    run_script("one_rank.py", lambda: run(*_parse()))
