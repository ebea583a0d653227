"""What one rank makes of its hardware: hvdlm by precision and compilation beside a GPT in plain PyTorch.

    python benchmarks/one_rank.py --data data/python-stdlib

Trains each model without communication, all contestants in turns, each in a process of its own, and writes
one_rank.json and one_rank.md. Any setting can be overridden as for `hvdlm train`, --section.key value.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from common.machine import describe_machine, describe_versions
from common.results import read_results, write_results
from common.script import absolute_path, as_overrides, run_script
from hvdlm.config import Config, load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import flops_per_token, training_memory_bytes
from solo.rank import Start, Turn, serve

_SMALL = {"model.layers": 6, "model.heads": 6, "model.width": 384, "model.context_length": 256}

# Name: settings over the preset's, and sequences a step
MODELS: dict[str, tuple[dict[str, object], int]] = {
    "gpt-10m": (_SMALL, 8),
    "gpt-10m-50k": ({**_SMALL, "model.vocab_size": 50304}, 8),
    "gpt2": ({"model.preset": "gpt2", "model.vocab_size": 50304}, 16),
    "gpt2-large": ({"model.preset": "gpt2-large", "model.vocab_size": 50304}, 16),
    "llama-1b": ({"model.preset": "llama-1b"}, 8),
}

PLAIN = "PyTorch fp32 eager"
CAST = "PyTorch bf16 autocast eager"

# Name: precision, compiled, plain
CONTESTANTS: dict[str, tuple[str, bool, bool]] = {
    PLAIN: ("fp32", False, True),
    CAST: ("bf16", False, True),
    "hvdlm fp32": ("fp32", False, False),
    "hvdlm bf16": ("bf16", False, False),
    "hvdlm bf16 compiled": ("bf16", True, False),
}

_PATIENCE = 600.0  # seconds that a step may take, compilation included


@dataclass
class Contestant:
    """One process, and what came of it."""

    config: Config
    process: BaseProcess
    pipe: Connection
    first_step_seconds: float
    start: Start
    turns: list[Turn] = field(default_factory=list)


def one_rank(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Each model in turn; what is done is written before the next one begins."""
    results = read_results(options.output / "one_rank.json")
    options.output.mkdir(parents=True, exist_ok=True)
    vocab_size = DataSet(options.data).vocab_size
    for model in options.models:
        with tempfile.TemporaryDirectory(prefix="hvdlm-one-rank-") as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what is compiled here was not compiled before
            results[model] = _measure(model, options, overrides, vocab_size)
        write_results(options.output / "one_rank.json", results)
        (options.output / "one_rank.md").write_text(table(results), encoding="utf-8")
        print(table({model: results[model]}))


def _measure(model: str, options: argparse.Namespace, overrides: Sequence[str], vocab_size: int) -> dict[str, Any]:
    """All contestants in turns; on a GPU, whose memory would not hold them all, one after the other."""
    configs = {name: configure(model, name, options, overrides) for name in options.contestants}
    on_gpu = torch.cuda.is_available() and all(config.train.device != "cpu" for config in configs.values())
    contestants: dict[str, Contestant] = {}
    cold: dict[str, float] = {}
    for names in [[name] for name in configs] if on_gpu else [list(configs)]:
        try:
            for name in names:
                if configs[name].train.compile:
                    first = _start(name, configs[name])
                    cold[name] = first.first_step_seconds
                    _end(first)
                contestants[name] = _start(name, configs[name])
            for number in range(options.rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    contestants[name].pipe.send(options.steps)
                    contestants[name].turns.append(_receive(name, contestants[name].pipe))
        finally:
            for name in names:
                if name in contestants:
                    _end(contestants[name])
    any_config = next(iter(configs.values()))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": {
            "rounds": options.rounds,
            "steps": options.steps,
            **any_config.model_dump(exclude={"data": {"path"}, "train": {"run_dir", "precision", "compile"}}),
        },
        "rows": [_row(name, each, contestants, vocab_size, cold.get(name)) for name, each in contestants.items()],
    }


def _row(
    name: str, own: Contestant, all_of_them: dict[str, Contestant], vocab_size: int, cold: float | None
) -> dict[str, Any]:
    """Medians over rounds; a ratio is taken between two contestants of the same round."""
    config = own.config
    vocab_size = config.model.vocab_size or vocab_size
    tokens = config.train.batch_size * config.model.context_length
    flops = flops_per_token(config.model, vocab_size) * tokens
    rates = [turn.peak_flops for turn in own.turns]
    train, device = config.train, "cpu" if own.start.base_bytes else "cuda"
    memory = training_memory_bytes(
        config.model,
        vocab_size,
        min(train.micro_batch_size, train.batch_size),
        train.precision,
        device,
        train.compile,
        train.recompute,
    )

    def over(reference: str) -> float | None:
        if reference not in all_of_them:
            return None
        pairs = zip(all_of_them[reference].turns, own.turns, strict=True)
        return statistics.median(theirs.step_seconds / mine.step_seconds for theirs, mine in pairs)

    return {
        "name": name,
        "tokens_per_second": statistics.median(tokens / turn.step_seconds for turn in own.turns),
        "over_fp32_eager": over(PLAIN),
        "over_autocast_eager": over(CAST),
        "product_flops": statistics.median(rate for rate in rates if rate) if all(rates) else None,
        "utilisation": (
            statistics.median(flops / turn.step_seconds / (turn.peak_flops or 1) for turn in own.turns)
            if all(rates)
            else None
        ),
        "memory_bytes": max(turn.memory_bytes for turn in own.turns),
        "predicted_bytes": None if name in (PLAIN, CAST) else own.start.base_bytes + memory.total,
        "first_step_seconds": own.first_step_seconds,
        "first_step_seconds_cold": cold,
        "loader_tokens_per_second": own.start.loader_tokens_per_second,
        "step_seconds": [turn.step_seconds for turn in own.turns],
    }


def configure(model: str, contestant: str, options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The settings of a row. Raises HvdlmError for overrides that are none."""
    settings, sequences = MODELS[model]
    precision, compiled, _ = CONTESTANTS[contestant]
    chosen = {
        **settings,
        "data.path": options.data,
        "train.batch_size": sequences,
        "train.micro_batch_size": sequences,
        "train.precision": precision,
        "train.compile": str(compiled).lower(),
        "train.threads": options.threads or os.cpu_count(),
        "train.steps": 10**6,
        "log.every": 10**6,
    }
    return load(None, [*as_overrides(chosen), *overrides], PRESETS)


def _start(name: str, config: Config) -> Contestant:
    """A process that has trained its first step."""
    begin = time.perf_counter()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, config, CONTESTANTS[name][2]), daemon=True
    )
    process.start()
    there.close()
    _receive(name, here)
    return Contestant(config, process, here, time.perf_counter() - begin, _receive(name, here))


def _receive(name: str, pipe: Connection) -> Any:
    try:
        if pipe.poll(_PATIENCE):
            return pipe.recv()
    except EOFError:
        raise HvdlmError(f"{name} has ended by itself: see its message above") from None
    raise HvdlmError(f"{name} has not answered within {_PATIENCE:g} s")


def _end(contestant: Contestant) -> None:
    if contestant.process.is_alive():
        contestant.pipe.send(0)
        contestant.process.join(30)
    if contestant.process.is_alive():
        contestant.process.kill()
        contestant.process.join()


def table(results: dict[str, Any]) -> str:
    """Markdown: one table a model, under what it ran on."""
    parts = []
    for model, result in results.items():
        machine, versions, settings = result["machine"], result["versions"], result["settings"]
        parts += [
            f"## {model}",
            "",
            f"{settings['train']['batch_size']} sequences of {settings['model']['context_length']} tokens a step, "
            f"{settings['train']['threads']} threads on {machine['cores']} cores of {machine['cpu']}{_gpu(machine)}; "
            f"torch {versions['torch']}; medians of {settings['rounds']} rounds of {settings['steps']} steps, "
            f"{result['date']}.",
            "",
            "|  | tokens/s | over fp32 eager | over autocast eager | products, TFLOP/s | utilisation | memory, MB "
            "| predicted, MB | first step, s | the same, cold, s | loader over training |",
            "|" + "---|" * 11,
        ]
        for row in result["rows"]:
            cells = [
                row["name"],
                f"{row['tokens_per_second']:,.0f}",
                _number(row["over_fp32_eager"], "{:.2f}"),
                _number(row["over_autocast_eager"], "{:.2f}"),
                _number(row["product_flops"], "{:.2f}", 1e-12),
                _number(row["utilisation"], "{:.0%}"),
                _number(row["memory_bytes"], "{:,.0f}", 1e-6),
                _number(row["predicted_bytes"], "{:,.0f}", 1e-6),
                _number(row["first_step_seconds"], "{:.1f}"),
                _number(row["first_step_seconds_cold"], "{:.1f}"),
                _number(row["loader_tokens_per_second"], "{:,.0f}", 1 / row["tokens_per_second"]),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _gpu(machine: dict[str, Any]) -> str:
    return f", {machine['gpu']}" if machine.get("gpu") else ""


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="any data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=Path(__file__).parent / "results", help="a directory")
    parser.add_argument("--models", nargs="+", default=["gpt-10m", "gpt-10m-50k"], choices=list(MODELS))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one a core")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of each contestant in a round that count")
    options, overrides = parser.parse_known_args()
    if options.rounds < 1 or options.steps < 1 or options.threads < 0:
        raise HvdlmError("give 1 or more --rounds and --steps, and 0 or more --threads")
    return options, overrides


if __name__ == "__main__":
    run_script("one_rank.py", lambda: one_rank(*_parse()))
