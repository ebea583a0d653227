"""Compares hvdlm's ways to combine work with PyTorch, Horovod, DeepSpeed, and training without communication.

    python benchmarks/compare.py --data data/python-stdlib

For each set-up it starts emulated hosts (as root; otherwise it uses one host only), measures all systems round by
round while they train the same model, and writes compare.json, compare.md and compare.png. benchmarks/README.md defines
the figures. The model is a GPT of 10.7M parameters in bf16, with 4 sequences of 256 tokens and one thread per rank; any
setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from common.conditions import describe_run, describe_settings
from common.results import read_results, write_results, write_text
from common.script import run_script
from common.setups import ONE_HOST, Setup, available_setups, parse_setup
from compare.compared_model import configure
from compare.options import add_rounds, measuring_parser, parse
from compare.plot import draw
from compare.registry import HOROVODRUN, PEERS, REFERENCE, group_systems, is_installed
from compare.runner import measure_setup
from compare.summary import find_problems, summarise, table
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import CODECS

SETUPS = (ONE_HOST, "2x100mbit", "2x1gbit", "2x10gbit", "4x100mbit", "4x1gbit", "4x10gbit")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures each set-up, and writes its results before the next one starts."""
    setups = available_setups([parse_setup(name, options.ranks) for name in options.setup])
    setups = [_of_micro_batches(setup, options.micro_batches) for setup in setups]
    groups = group_systems(options.codecs, options.engines, options.peers, options.horovodrun)
    configs = {setup.name: configure(options.data, setup.ranks * options.micro_batches, overrides) for setup in setups}
    options.output.mkdir(parents=True, exist_ok=True)
    results = read_results(options.output / "compare.json")
    problems: list[str] = []
    for setup in setups:
        config = configs[setup.name]
        measured = measure_setup(setup, groups, config, options.rounds, options.steps)
        rows = summarise(measured, config.train.global_batch_size * config.model.context_length)
        results[setup.name] = {
            **describe(setup, config, options),
            "summary": [asdict(row) for row in rows],
            "systems": [asdict(result) for result in measured],
        }
        write_results(options.output / "compare.json", results)
        write_text(options.output / "compare.md", table(results))
        draw(results, options.output / "compare.png")
        print(table({setup.name: results[setup.name]}))
        problems += [f"{setup.name}: {sentence}" for sentence in find_problems(measured)]
    if problems:
        raise HvdlmError("do not use these figures: " + "; ".join(problems))


def _of_micro_batches(setup: Setup, micro_batches: int) -> Setup:
    """The set-up, under a name of its own where a step has more than one micro-batch for each rank."""
    return setup if micro_batches == 1 else replace(setup, name=f"{setup.name}, {micro_batches} micro-batches")


def describe(setup: Setup, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """The conditions of a set-up's results."""
    settings = {"rounds": options.rounds, "steps": options.steps, **describe_settings(config)}
    return {**describe_run("deepspeed", "torchft"), "setup": asdict(setup), "settings": settings}


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = measuring_parser(__doc__, SETUPS)
    parser.add_argument(
        "--codecs",
        nargs="+",
        default=list(CODECS),
        help="of hvdlm, or FILE.py:CLASS (default: all); CODEC/EVERY/FRAGMENTS/OVERLAP: local steps; dion; "
        "zeroSTAGE[:CODEC[:WEIGHTS]]; tensor; pipeline[:SCHEDULE][:bf16 or :int8]",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["mpi", "torch", "horovod"],
        choices=["mpi", "torch", "horovod"],
        help="of hvdlm: the first with every codec, the others with codec none (default: %(default)s)",
    )
    others = [name for name in PEERS if name != REFERENCE]
    installed = [name for name in others if is_installed(name)]
    parser.add_argument(
        "--peers", nargs="*", default=installed, choices=others, help=f"besides {REFERENCE} (default: all)"
    )
    parser.add_argument(
        "--horovodrun",
        nargs="+",
        default=[],
        choices=list(HOROVODRUN),
        help="hvdlm with every codec also under horovodrun, over MPI or Gloo (default: not)",
    )
    add_rounds(parser, micro_batches=1, rounds=15, steps=6)
    return parse(parser, quick=(5, 2))


if __name__ == "__main__":
    run_script("compare.py", lambda: run(*_parse()))
