"""How long training stands still when a rank is killed, and what it loses.

    hvdlm prepare --input python-stdlib --tokenizer bpe:1024 --output data/convergence
    python benchmarks/recovery.py --data data/convergence

In each trial one rank of a job is killed (SIGKILL), at a moment and with a rank that the trial's number draws. Systems:
`comm.elastic` under mpirun --with-ft ulfm; and mpirun started again with --resume latest once the job has ended. Trials
of both alternate. Each run's losses are compared with those of a run in which nobody dies. Writes recovery.json and
recovery.md; benchmarks/README.md defines the figures. Any setting can be overridden as for `hvdlm train`, by
--section.key value.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.conditions import describe_run, describe_settings
from common.processes import end_launcher, hvdlm_command, start_launcher
from common.results import markdown_table, read_results, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from common.setups import ONE_HOST, Cluster, available_setups, open_cluster, parse_setup
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from recovery.trial import Lines, Trial, make_plan, run_trial

SETUPS = (ONE_HOST, "4x1gbit")
SETTINGS = {
    "model.position": "rope",
    "train.steps": 100,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 4,
    "train.evaluate_every": 0,
    "train.evaluate_sequences": 32,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 10,
    "checkpoint.every": 20,
    "log.every": 1,
}
SYSTEMS = ("elastic", "restart")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures each set-up, and writes its results before the next one starts."""
    DataSet(options.data)
    config = load(None, [*as_overrides(SETTINGS), *overrides, "--data.path", str(options.data)], PRESETS)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "recovery.json"
    results: dict[str, Any] = read_results(path)
    for setup in available_setups([parse_setup(name, options.ranks) for name in options.setup]):
        with (
            tempfile.TemporaryDirectory(prefix="hvdlm-recovery-") as directory,
            open_cluster(setup, Path(directory, "fabric")) as cluster,
        ):
            found = _measure(cluster, config, options, Path(directory))
        results[setup.name] = {**describe_run(), "settings": describe_settings(config), **found}
        write_results(path, results)
        write_text(options.output / "recovery.md", table(results))
    print(table(results))


def _measure(cluster: Cluster, config: Config, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The undisturbed run, then trials of all systems in turns."""
    whole, seconds = _undisturbed(cluster, config, directory)
    trials: dict[str, list[dict[str, Any]]] = {system: [] for system in options.systems}
    for seed in range(options.trials):
        plan = make_plan(seed, cluster.setup.ranks, config.train.steps, seconds)
        for system in options.systems:
            run_dir, log = directory / f"{system}{seed}", directory / f"{system}{seed}.log"
            start = _command(cluster, config, run_dir, system == "elastic")
            again = [*start, "--resume", "latest"] if system == "restart" else None
            trial = run_trial(start, again, run_dir, config.train.steps, plan, log)
            worst = max(abs(trial.losses[step] / whole[step] - 1) for step in whole)
            print(f"== {cluster.setup.name}, {system}, trial {seed}: {_sentence(trial, worst)}", flush=True)
            kept = {name: value for name, value in asdict(trial).items() if name != "losses"}
            trials[system].append({**kept, "worst_loss_difference": worst, "lost": len(whole.keys() - trial.losses)})
    return {"step_seconds": seconds, "trials": trials}


def _undisturbed(cluster: Cluster, config: Config, directory: Path) -> tuple[dict[int, float], float]:
    """The losses of a run in which nobody dies, and the seconds of a step."""
    run_dir, steps = directory / "undisturbed", config.train.steps
    lines = Lines(run_dir)
    with (directory / "undisturbed.log").open("wb") as log:
        job = start_launcher(_command(cluster, config, run_dir, elastic=True), log)
        try:
            lines.wait_for(steps, job)
            job.wait()
        finally:
            if job.poll() is None:
                end_launcher(job)
    return lines.losses, (lines.times[steps] - lines.times[steps // 4]) / (steps - steps // 4)


def _command(cluster: Cluster, config: Config, run_dir: Path, elastic: bool) -> list[str]:
    own = config.model_copy(
        update={
            "train": config.train.model_copy(update={"run_dir": str(run_dir)}),
            "comm": config.comm.model_copy(update={"elastic": elastic}),
        }
    )
    settings = run_dir.with_suffix(".toml")
    settings.write_text(own.to_toml(), encoding="utf-8")
    tolerance = ["--with-ft", "ulfm"] if elastic else []
    words = ["train", str(settings), "--train.run_dir", str(run_dir)]
    return [*cluster.launcher, *tolerance, hvdlm_command(), *words]


def _sentence(trial: Trial, worst: float) -> str:
    return (
        f"rank {trial.rank} killed after step {trial.step}, {trial.seconds:.2f} s to the end of a step, "
        f"{trial.steps_repeated} steps repeated, loss within {worst:.1e}, ended after {trial.seconds_to_end:.1f} s"
    )


def table(results: dict[str, Any]) -> str:
    """Markdown of what is in recovery.json."""
    rows = [_row(setup, system, found) for setup, found in results.items() for system in found["trials"]]
    columns = ("set-up", "system", "trials", "step, s", "median, s", "worst, s", "repeated", "lost", "loss", "end, s")
    return markdown_table(columns, rows)


def _row(setup: str, system: str, found: dict[str, Any]) -> list[str]:
    trials = found["trials"][system]
    seconds = [trial["seconds"] for trial in trials]
    return [
        setup,
        system,
        str(len(trials)),
        f"{found['step_seconds']:.2f}",
        f"{statistics.median(seconds):.2f}",
        f"{max(seconds):.2f}",
        str(sum(trial["steps_repeated"] for trial in trials)),
        str(sum(trial["lost"] for trial in trials)),
        f"{max(trial['worst_loss_difference'] for trial in trials):.0e}",
        f"{max(trial['seconds_to_end'] for trial in trials):.1f}",
    ]


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="a data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument("--setup", nargs="+", default=SETUPS, help=f"HOSTSxRATE, or {ONE_HOST} (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help=f"of {ONE_HOST}")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS, help="(default: all)")
    parser.add_argument("--trials", type=int, default=20)
    options, overrides = parser.parse_known_args()
    if options.trials < 1 or options.ranks < 2:
        raise HvdlmError("give 1 or more --trials, and 2 or more --ranks")
    return options, overrides


if __name__ == "__main__":
    run_script("recovery.py", lambda: run(*_parse()))
