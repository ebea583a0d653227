"""hvdlm's codecs beside PyTorch DDP and Horovod's optimizer, and the limit: the same training without communication.

    python benchmarks/compare.py --data data/python-stdlib

Brings up emulated hosts for each set-up (root; without it, one host only), lets all contestants train the same model
in turns, and writes compare.json, compare.md and compare.png. README.md beside this file defines the figures. The
model is a GPT of 10.7M parameters in bf16, 4 sequences of 256 tokens a rank, one thread a rank; any setting
can be overridden as for `hvdlm train`, --section.key value.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.machine import describe_machine, describe_versions
from common.results import read_results, write_results
from common.script import absolute_path, as_overrides, run_script
from common.setups import ONE_HOST, Setup, opened, parse_setup, possible
from comparison.lineup import PEERS, REFERENCE, line_up
from comparison.picture import draw
from comparison.race import race
from comparison.standings import objections, standings
from comparison.table import table
from hvdlm.config import Config, load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.choice import CODECS
from hvdlm.model.presets import PRESETS

SETUPS = (ONE_HOST, "2x100mbit", "2x1gbit", "2x10gbit", "4x100mbit", "4x1gbit", "4x10gbit")

MODEL = {
    "model.layers": 6,
    "model.heads": 6,
    "model.width": 384,
    "model.context_length": 256,
    "train.micro_batch_size": 4,
    "train.precision": "bf16",
}


def compare(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs each set-up in turn; what is done is written before the next one begins."""
    setups = possible([parse_setup(name, options.ranks) for name in options.setup])
    crews = line_up(options.codecs, options.engines, options.peers)
    configs = {setup.name: configure(options.data, setup.ranks, overrides) for setup in setups}
    options.output.mkdir(parents=True, exist_ok=True)
    results = read_results(options.output / "compare.json")
    against: list[str] = []
    for setup in setups:
        config = configs[setup.name]
        with (
            tempfile.TemporaryDirectory(prefix="hvdlm-compare-") as directory,
            opened(setup, Path(directory, "fabric")) as place,
        ):
            scratch = Path(directory, "race")
            scratch.mkdir()
            outcomes = race(place, crews, config, options.rounds, options.steps, scratch)
        results[setup.name] = {
            **describe(setup, config, options),
            "standings": [
                asdict(standing)
                for standing in standings(outcomes, config.train.batch_size * config.model.context_length)
            ],
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        write_results(options.output / "compare.json", results)
        (options.output / "compare.md").write_text(table(results), encoding="utf-8")
        draw(results, options.output / "compare.png")
        print(table({setup.name: results[setup.name]}))
        against += [f"{setup.name}: {sentence}" for sentence in objections(outcomes)]
    if against:
        raise HvdlmError("do not use these figures: " + "; ".join(against))


def configure(data: Path, ranks: int, overrides: Sequence[str]) -> Config:
    """The settings of every contestant. Raises HvdlmError for overrides that are none, or without a data set."""
    DataSet(data)
    fixed = ["--data.path", str(data), "--train.threads", "1", "--train.steps", str(10**6), "--log.every", str(10**6)]
    config = load(None, [*as_overrides(MODEL), *overrides, *fixed], PRESETS)
    train = config.train.model_copy(update={"batch_size": config.train.micro_batch_size * ranks})
    return config.model_copy(update={"train": train})


def describe(setup: Setup, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """On what, when and how a race was run."""
    settings = config.model_dump(exclude={"data": {"path"}, "train": {"run_dir"}})
    return {
        "date": time.strftime("%Y-%m-%d"),
        "setup": asdict(setup),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": {"rounds": options.rounds, "steps": options.steps, **settings},
    }


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="any data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=Path(__file__).parent / "results", help="a directory")
    parser.add_argument(
        "--setup", nargs="+", default=SETUPS, help=f"HOSTSxRATE, {ONE_HOST} (default: all of the table)"
    )
    parser.add_argument("--ranks", type=int, default=2, help=f"of {ONE_HOST}; elsewhere there is one a host")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="of hvdlm, or FILE.py:CLASS (default: all)")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["mpi", "torch", "horovod"],
        choices=["mpi", "torch", "horovod"],
        help="of hvdlm: the first with every codec, others with none (default: %(default)s)",
    )
    others = [name for name in PEERS if name != REFERENCE]
    parser.add_argument("--peers", nargs="*", default=others, choices=others, help=f"beside {REFERENCE} (default: all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6, help="steps of each contestant in a round that count")
    parser.add_argument("--quick", action="store_true", help="5 rounds of 2 steps: for a first look only")
    options, overrides = parser.parse_known_args()
    if options.quick:
        options.rounds, options.steps = 5, 2
    if options.rounds < 1 or options.steps < 1 or options.ranks < 2:
        raise HvdlmError("give 1 or more --rounds and --steps, and 2 or more --ranks")
    return options, overrides


if __name__ == "__main__":
    run_script("compare.py", lambda: compare(*_parse()))
