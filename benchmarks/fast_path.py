"""Whether hvdlm in bf16, compiled, has the same loss curve as a GPT in plain PyTorch.

    python benchmarks/fast_path.py --data data/python-stdlib

Trains from the same weights on the same batches, for several seeds: a GPT in plain PyTorch in fp32, the same under bf16
autocast, and hvdlm. The difference of autocast from fp32 is what bf16 costs; hvdlm should not differ more. Writes
fast_path.json, fast_path.md and fast_path.png. Any setting can be overridden as for `hvdlm train`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from common.conditions import describe_run, describe_settings
from common.plots import save_png
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.report.palette import BLACK, BLUE, ORANGE
from hvdlm.training.trainer import Trainer
from one_rank.plain_gpt import PlainGPT, plain_step

SETTINGS = {
    "model.layers": 4,
    "model.heads": 4,
    "model.width": 256,
    "model.context_length": 128,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "optimizer.warmup_steps": 30,
    "log.every": 1,
}

FP32, AUTOCAST, HVDLM = "PyTorch, fp32", "PyTorch, bf16 autocast", "hvdlm, bf16, compiled"
_COLOURS = {FP32: BLACK, AUTOCAST: ORANGE, HVDLM: BLUE}
_WINDOW = 20  # steps over which the plot averages differences

Curves = dict[str, list[list[float]]]  # losses by system, seed and step


class _LossLog:
    """A metrics log that keeps the training losses and nothing else."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, kind: str, step: int, **values: Any) -> None:
        if kind == "train":
            self.losses.append(values["loss"])


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains all systems with one seed, then with the next, and writes the results."""
    torch.set_num_threads(options.threads)
    data = DataSet(options.data)
    curves: Curves = {FP32: [], AUTOCAST: [], HVDLM: []}
    for seed in range(options.seeds):
        for system, by_seed in curves.items():
            begin = time.perf_counter()
            by_seed.append(_train(system, configure(system, seed, options, overrides), data))
            seconds = time.perf_counter() - begin
            print(f"{system}, seed {seed}: {by_seed[-1][-1]:.4f} after {seconds:.0f} s", flush=True)
    settings = describe_settings(configure(HVDLM, 0, options, overrides), "seed")
    options.output.mkdir(parents=True, exist_ok=True)
    write_results(options.output / "fast_path.json", {**describe_run(), "settings": settings, "curves": curves})
    write_text(options.output / "fast_path.md", table(curves))
    draw(curves, options.output / "fast_path.png")
    print(table(curves))


def _train(system: str, config: Config, data: DataSet) -> list[float]:
    """Trains one system; returns the loss of each step."""
    device = torch.device("cpu")
    vocab_size = config.model.vocab_size or data.vocab_size
    trainer = Trainer(config, SoloCommunicator(), data, vocab_size, device)
    with trainer.open_loader() as loader:
        if system != HVDLM:
            return _train_plain(trainer, vocab_size, config, loader, device)
        log = _LossLog()
        trainer.metrics = log  # type: ignore[assignment]
        for _ in range(config.train.steps):
            trainer.train_step(loader, stop_here=False)
    return log.losses


def _train_plain(
    trainer: Trainer, vocab_size: int, config: Config, loader: Loader, device: torch.device
) -> list[float]:
    model = PlainGPT(config, vocab_size, approximate="tanh")
    model.copy_weights(trainer.model)
    step = plain_step(model, config, loader, device)
    return [step() for _ in range(config.train.steps)]


def configure(system: str, seed: int, options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The settings of one run. Raises HvdlmError for unknown overrides."""
    chosen = {
        "data.path": options.data,
        "train.steps": options.steps,
        "train.seed": seed,
        "train.precision": "fp32" if system == FP32 else "bf16",
        "train.compile": str(system == HVDLM).lower(),
    }
    return load(None, [*as_overrides({**SETTINGS, **chosen}), *overrides], PRESETS)


def differences(curves: Curves, system: str) -> list[list[float]]:
    """A system's loss minus that in fp32, by seed and step."""
    return [
        [own - exact for own, exact in zip(curve, reference, strict=True)]
        for curve, reference in zip(curves[system], curves[FP32], strict=True)
    ]


def table(curves: Curves) -> str:
    """Markdown: means over seeds; of the differences from fp32, their mean size, and their mean over the last third."""
    columns = ("", "last 20 losses", "size of difference from fp32", "difference over the last third")
    rows = []
    for system, by_seed in curves.items():
        from_fp32 = differences(curves, system)
        last = statistics.fmean(statistics.fmean(curve[-20:]) for curve in by_seed)
        size = statistics.fmean(abs(each) for curve in from_fp32 for each in curve)
        bias = statistics.fmean(each for curve in from_fp32 for each in curve[-len(curve) // 3 :])
        both = ("", "") if system == FP32 else (f"{size:.5f}", f"{bias:+.5f}")
        rows.append((system, f"{last:.4f}", *both))
    return f"{len(curves[FP32])} seeds, {len(curves[FP32][0])} steps.\n\n{markdown_table(columns, rows)}"


def draw(curves: Curves, path: Path) -> None:
    """Writes a PNG: loss over steps, and the differences from fp32. Lines are means over seeds, bands their range."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for system, by_seed in curves.items():
        steps = range(1, len(by_seed[0]) + 1)
        means = [statistics.fmean(losses) for losses in zip(*by_seed, strict=True)]
        style = "-" if system == FP32 else "--"
        left.plot(steps, means, style, color=_COLOURS[system], linewidth=1.2, label=system)
        if system == FP32:
            continue
        smooth = [_moving_mean(curve) for curve in differences(curves, system)]
        by_step = list(zip(*smooth, strict=True))
        steps = range(_WINDOW, len(by_seed[0]) + 1)
        right.plot(steps, [statistics.fmean(each) for each in by_step], color=_COLOURS[system], label=system)
        low, high = ([choose(each) for each in by_step] for choose in (min, max))
        right.fill_between(steps, low, high, color=_COLOURS[system], alpha=0.2)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.set(xlabel="step", ylabel=f"loss minus that in fp32, mean of {_WINDOW} steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_png(figure, path)


def _moving_mean(curve: Sequence[float]) -> list[float]:
    return [statistics.fmean(curve[end - _WINDOW : end]) for end in range(_WINDOW, len(curve) + 1)]


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="a data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options, overrides = parser.parse_known_args()
    if options.steps < 60 or options.seeds < 1 or options.threads < 1:
        raise HvdlmError("give 60 or more --steps, and 1 or more --seeds and --threads")
    return options, overrides


if __name__ == "__main__":
    run_script("fast_path.py", lambda: run(*_parse()))
