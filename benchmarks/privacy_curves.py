"""What a budget of differential privacy costs of the loss: validation loss over steps for several epsilons.

    python benchmarks/privacy_curves.py CONFIG --epsilon 2 8 --ranks 2

Runs of as many steps: for each epsilon, with clipping and no noise, and without `[privacy]`. Each is `hvdlm train`
under mpirun; one that is finished is not trained again. Writes privacy_curves.json, .md and .png. Any setting can be
overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.conditions import describe_run, describe_settings
from common.plots import save_png
from common.processes import environment
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.metrics import read_metrics

_NO_NOISE, _PLAIN = "clipped, no noise", "without privacy"


def measure(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains what is not finished, and writes the results."""
    config = load(options.config, overrides, PRESETS)
    clipped = {"privacy.clip_norm": options.clip_norm, "privacy.delta": options.delta, "privacy.secure": "false"}
    variants: dict[str, dict[str, object]] = {
        f"epsilon {epsilon:g}": {**clipped, "privacy.target_epsilon": epsilon} for epsilon in options.epsilon
    }
    variants |= {_NO_NOISE: clipped, _PLAIN: {}}
    rows: list[dict[str, Any]] = []
    for name, settings in variants.items():
        records = _trained(name, settings, options, overrides, config.planned_steps)
        evaluated = [(each["step"], each["loss"]) for each in records if each["kind"] == "eval"]
        spent = [each["epsilon"] for each in records if each.get("epsilon") is not None]
        rows.append({"name": name, "epsilon": spent[-1] if spent else None, "validation": evaluated})
        write_results(
            options.output / "privacy_curves.json",
            {**describe_run("dp-accounting"), "settings": describe_settings(config), "rows": rows},
        )
    cells = [
        [row["name"], f"{row['epsilon']:.3f}" if row["epsilon"] else "", f"{row['validation'][-1][1]:.4f}"]
        for row in rows
    ]
    text = markdown_table(["run", "epsilon spent", "validation loss"], cells)
    write_text(options.output / "privacy_curves.md", text)
    _draw(rows, options.output / "privacy_curves.png")
    print(text)


def _trained(
    name: str, settings: dict[str, object], options: argparse.Namespace, overrides: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    """What a run has measured."""
    run_dir = options.runs / name.replace(" ", "_").replace(",", "")
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    if not any(each["kind"] == "eval" and each["step"] == steps for each in records):
        own = {**settings, "train.run_dir": run_dir}
        launcher = ["mpirun", "-np", str(options.ranks), "--bind-to", "none"]
        resume = ["--resume", "latest"] if records else []
        command = [*launcher, sys.executable, "-m", "hvdlm", "train", str(options.config), *resume]
        if subprocess.run([*command, *overrides, *as_overrides(own)], env=environment()).returncode:
            raise HvdlmError(f"the run in {run_dir} has failed: see above, and start this again")
    return read_metrics(metrics)


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for row in rows:
        axes.plot(*zip(*row["validation"], strict=True), label=row["name"])
    axes.set(xlabel="steps", ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[2.0, 8.0], help="default: 2 8")
    parser.add_argument("--delta", type=float, default=1e-6, help="default: %(default)s")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--runs", type=absolute_path, default="runs/privacy", help="a directory of run directories")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, metavar="DIR")
    measure(*parser.parse_known_args())


if __name__ == "__main__":
    run_script(Path(__file__).name, _main)
