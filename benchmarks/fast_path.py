"""Whether the fast path trains as the plain one does: curves of hvdlm in bf16, compiled, beside plain PyTorch's.

    python benchmarks/fast_path.py --data data/python-stdlib

From the same weights on the same batches, over several seeds: a GPT in plain PyTorch in fp32, the same under bf16
autocast, and hvdlm. What autocast differs from fp32 is what bf16 costs; hvdlm should differ no more. Writes
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.machine import describe_machine, describe_versions
from common.results import write_results
from common.script import absolute_path, as_overrides, run_script
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config, load
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.trainer import Trainer
from solo.plain import PlainGPT, plain_step

SETTINGS = {
    "model.layers": 4,
    "model.heads": 4,
    "model.width": 256,
    "model.context_length": 128,
    "train.batch_size": 8,
    "train.micro_batch_size": 8,
    "optimizer.warmup_steps": 30,
    "log.every": 1,
}

EXACT, CAST, FAST = "PyTorch, fp32", "PyTorch, bf16 autocast", "hvdlm, bf16, compiled"
_COLOURS = {EXACT: "black", CAST: "#E69F00", FAST: "#0072B2"}  # by Okabe and Ito
_WINDOW = 20  # steps over which differences are averaged for the picture

Curves = dict[str, list[list[float]]]  # by path, then by seed, then by step


class _Losses:
    """Takes a run's metrics for what is asked of them here."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, kind: str, step: int, **values: Any) -> None:
        if kind == "train":
            self.losses.append(values["loss"])


def study(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """All paths with one seed, then with the next."""
    torch.set_num_threads(options.threads)
    data = DataSet(options.data)
    curves: Curves = {EXACT: [], CAST: [], FAST: []}
    for seed in range(options.seeds):
        for path in curves:
            begin = time.perf_counter()
            curves[path].append(_train(path, configure(path, seed, options, overrides), data))
            print(
                f"{path}, seed {seed}: {curves[path][-1][-1]:.4f} after {time.perf_counter() - begin:.0f} s", flush=True
            )
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": configure(FAST, 0, options, overrides).model_dump(
            exclude={"data": {"path"}, "train": {"run_dir", "seed"}}
        ),
        "curves": curves,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_results(options.output / "fast_path.json", results)
    (options.output / "fast_path.md").write_text(table(curves), encoding="utf-8")
    draw(curves, options.output / "fast_path.png")
    print(table(curves))


def _train(path: str, config: Config, data: DataSet) -> list[float]:
    """The loss of each step."""
    device = torch.device("cpu")
    vocab_size = config.model.vocab_size or data.vocab_size
    trainer = Trainer(config, SoloCommunicator(), data, vocab_size, device)
    with trainer.open_loader() as loader:
        if path != FAST:
            return _train_plain(trainer, vocab_size, config, loader, device)
        losses = _Losses()
        trainer.metrics = losses  # type: ignore[assignment]
        for _ in range(config.train.steps):
            trainer.train_step(loader, stop_here=False)
    return losses.losses


def _train_plain(
    trainer: Trainer, vocab_size: int, config: Config, loader: Loader, device: torch.device
) -> list[float]:
    model = PlainGPT(config, vocab_size, approximate="tanh")
    model.begin_as(trainer.model)
    step = plain_step(model, config, loader, device)
    return [step() for _ in range(config.train.steps)]


def configure(path: str, seed: int, options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The settings of one run. Raises HvdlmError for overrides that are none."""
    chosen = {
        "data.path": options.data,
        "train.steps": options.steps,
        "train.seed": seed,
        "train.precision": "fp32" if path == EXACT else "bf16",
        "train.compile": str(path == FAST).lower(),
    }
    return load(None, [*as_overrides({**SETTINGS, **chosen}), *overrides], PRESETS)


def differences(curves: Curves, path: str) -> list[list[float]]:
    """A path's loss minus that in fp32, by seed and step."""
    return [
        [own - exact for own, exact in zip(curve, reference, strict=True)]
        for curve, reference in zip(curves[path], curves[EXACT], strict=True)
    ]


def table(curves: Curves) -> str:
    """Markdown: means over seeds; of differences from fp32, their mean size and their mean over the last third."""
    lines = [
        f"{len(curves[EXACT])} seeds, {len(curves[EXACT][0])} steps.",
        "",
        "|  | last 20 losses | size of difference from fp32 | difference over the last third |",
        "|---|---|---|---|",
    ]
    for path, by_seed in curves.items():
        apart = differences(curves, path)
        last = statistics.fmean(statistics.fmean(curve[-20:]) for curve in by_seed)
        size = statistics.fmean(abs(each) for curve in apart for each in curve)
        bias = statistics.fmean(each for curve in apart for each in curve[-len(curve) // 3 :])
        cells = [path, f"{last:.4f}", "", ""] if path == EXACT else [path, f"{last:.4f}", f"{size:.5f}", f"{bias:+.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(curves: Curves, path: Path) -> None:
    """Writes a PNG: loss over steps, and the differences from fp32; lines are means over seeds, bands their range."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, by_seed in curves.items():
        steps = range(1, len(by_seed[0]) + 1)
        means = [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
        left.plot(steps, means, "-" if name == EXACT else "--", color=_COLOURS[name], linewidth=1.2, label=name)
        if name == EXACT:
            continue
        smooth = [_moving_mean(curve) for curve in differences(curves, name)]
        columns = list(zip(*smooth, strict=True))
        across = range(_WINDOW, len(by_seed[0]) + 1)
        right.plot(across, [statistics.fmean(column) for column in columns], color=_COLOURS[name], label=name)
        low, high = ([choose(column) for column in columns] for choose in (min, max))
        right.fill_between(across, low, high, color=_COLOURS[name], alpha=0.2)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.set(xlabel="step", ylabel=f"loss minus that in fp32, mean of {_WINDOW} steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=200)


def _moving_mean(curve: Sequence[float]) -> list[float]:
    return [statistics.fmean(curve[end - _WINDOW : end]) for end in range(_WINDOW, len(curve) + 1)]


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="any data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=Path(__file__).parent / "results", help="a directory")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options, overrides = parser.parse_known_args()
    if options.steps < 60 or options.seeds < 1 or options.threads < 1:
        raise HvdlmError("give 60 or more --steps, and 1 or more --seeds and --threads")
    return options, overrides


if __name__ == "__main__":
    run_script("fast_path.py", lambda: study(*_parse()))
