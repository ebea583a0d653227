"""How long each way to combine the work of ranks takes to a loss, on links of several rates.

    hvdlm prepare --input python-stdlib --tokenizer bpe:1024 --output data/convergence
    python benchmarks/time_to_loss.py --data data/convergence

Each method is trained on one host, with several seeds: at several learning rates, and at the best of them at several
lengths. The seconds of a step are measured on emulated hosts (as root) with the same code, round
by round, as compare.py does it. Finished runs are skipped: an interrupted study continues when it is started again.
Writes time_to_loss.json, .md and .png; benchmarks/README.md defines the figures. The model is that of convergence.py;
any setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.conditions import describe_run, describe_settings
from common.methods import parse_method
from common.results import read_results, write_results, write_text
from common.script import RESULTS, absolute_path, run_script
from common.setups import ONE_HOST, Setup, available_setups, open_cluster, parse_setup
from compare.registry import LIMIT, REFERENCE, group_systems, hvdlm_name
from compare.runner import measure_setup
from compare.summary import summarise
from convergence.runs import configure
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from time_to_loss.time_table import draw, make_rows, table
from time_to_loss.trained import DENSE, Trained, best_rate, train_all

METHODS = (DENSE, "fp16", "int4", "topk", "powersgd", "int4/2/2/1", "int4/4/4/1", "int4/16/4/5")
SETUPS = ("2x1gbit", "2x100mbit", "2x10mbit")
PEERS = (REFERENCE, "Horovod")  # their gradients are those of codec none, and so are their curves over tokens


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains what is not finished, then measures each set-up and writes its results before the next one starts."""
    methods = list(dict.fromkeys([DENSE, *options.methods]))
    for text in methods:
        parse_method(text)
    setups = available_setups([parse_setup(name, 2) for name in options.setup])
    config = configure(options.data, overrides)
    options.output.mkdir(parents=True, exist_ok=True)
    trained, swept, rates = _train(methods, config, options)
    path = options.output / "time_to_loss.json"
    results: dict[str, Any] = {
        **describe_run(),
        "settings": {**describe_settings(config), "rounds": options.rounds, "steps": options.steps},
        "runs": [asdict(each) for each in trained],
        "sweep": [asdict(each) for each in swept],
        "setups": read_results(path).get("setups", {}),
    }
    for setup in setups:
        speeds = _measure(setup, methods, config, options)
        rows = make_rows(trained, rates, speeds)
        results["setups"][setup.name] = {
            "rows": [asdict(row) for row in rows],
            "methods": {name: method for name, (method, *_) in speeds.items()},
        }
        write_results(path, results)
        write_text(options.output / "time_to_loss.md", table(results))
        tokens_per_step = config.train.global_batch_size * config.model.context_length
        draw(trained, results, tokens_per_step, options.output / "time_to_loss.png")
    print(table(results))


def _train(
    methods: Sequence[str], config: Config, options: argparse.Namespace
) -> tuple[list[Trained], list[Trained], dict[str, float]]:
    """The runs at the best learning rate of each method, those of the sweep, and these rates."""
    setup = parse_setup(ONE_HOST, 2)
    with (
        tempfile.TemporaryDirectory(prefix="hvdlm-time-to-loss-") as directory,
        open_cluster(setup, Path(directory, "fabric")) as cluster,
    ):
        seeds = range(options.seeds)
        sweep = [(method, rate, 1.0, seed) for seed, method, rate in itertools.product(seeds, methods, options.rates)]
        swept = train_all(cluster, config, sweep, options.runs)
        rates = {method: best_rate(swept, method) for method in methods}
        wanted = [
            (method, rates[method], length, seed)
            for seed, method, length in itertools.product(seeds, methods, options.lengths)
            if length == 1 or method != DENSE
        ]
        trained = train_all(cluster, config, wanted, options.runs)
    return trained, swept, rates


def _measure(
    setup: Setup, methods: Sequence[str], config: Config, options: argparse.Namespace
) -> dict[str, tuple[str, float, float]]:
    """By name in the table: the method whose curve it is, speed over the limit's, seconds of a step."""
    each = config.train.global_batch_size // setup.ranks
    if each * setup.ranks != config.train.global_batch_size:
        raise HvdlmError(f"train.global_batch_size = {config.train.global_batch_size} does not suit {setup.name}")
    fixed = {"micro_batch_size": each, "threads": 1, "steps": 10**6, "evaluate_every": 0}
    timed = config.model_copy(
        update={
            "train": config.train.model_copy(update=fixed),
            "log": config.log.model_copy(update={"every": 10**6}),
        }
    )
    peers = [name for name in PEERS if name != REFERENCE]
    groups = group_systems(methods, ["mpi"], peers)
    measured = measure_setup(setup, groups, timed, options.rounds, options.steps)
    tokens = config.train.global_batch_size * config.model.context_length
    by_name = {row.name: row for row in summarise(measured, tokens)}
    named = {LIMIT: (LIMIT, DENSE)}
    named.update({hvdlm_name("mpi", method): (parse_method(method).name, method) for method in methods})
    named.update({peer: (peer, DENSE) for peer in PEERS})
    return {
        name: (method, row.of_limit, tokens / row.tokens_per_second)
        for system, (name, method) in named.items()
        if (row := by_name[system]).of_limit is not None and row.tokens_per_second is not None
    }


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="of hvdlm prepare, at least 10 MB of text")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument(
        "--runs", type=absolute_path, default="runs/time-to-loss", help="a directory of run directories"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        help="CODEC, CODEC/EVERY/FRAGMENTS/OVERLAP or dion (default: %(default)s)",
    )
    parser.add_argument("--setup", nargs="+", default=SETUPS, help="HOSTSxRATE (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[3e-3, 6e-3, 1.2e-2], help="learning rates (default: %(default)s)"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=float, default=[1.0, 1.25], help="of runs, over train.steps (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each system in a round, or more")
    options, overrides = parser.parse_known_args()
    if options.seeds < 1 or options.rounds < 1 or options.steps < 1 or min(options.lengths) < 1:
        raise HvdlmError("give 1 or more --seeds, --rounds and --steps, and --lengths of 1 or more")
    options.lengths = sorted({1.0, *options.lengths})
    return options, overrides


if __name__ == "__main__":
    run_script("time_to_loss.py", lambda: run(*_parse()))
