"""How long training stands still when a rank is killed, and what it loses.

    hvdlm prepare --input python-stdlib --tokenizer bpe:1024 --output data/convergence
    python benchmarks/recovery.py --data data/convergence

In each trial one rank of a job is killed (SIGKILL), at a moment and with a rank that the trial's number draws. Systems:
`comm.elastic` under mpirun --with-ft ulfm; mpirun started again with --resume latest once the job has ended; elastic
Horovod; torchft. Trials of all alternate. Losses are compared with those of a run of the same system in which nobody
dies. Writes recovery.json and recovery.md; benchmarks/README.md defines the figures. Any setting can be overridden as
for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.conditions import describe_run, describe_settings
from common.results import read_results, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from common.setups import ONE_HOST, Cluster, available_setups, open_cluster, parse_setup
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from recovery.recovery_systems import HVDLM, SYSTEMS
from recovery.recovery_table import table, worst_loss_difference
from recovery.step_lines import LoggedStep
from recovery.trial import Plan, Trial, make_plan, run_trial, run_undisturbed

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


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures each set-up, and writes its results before the next one starts.

    Raises HvdlmError at the end if a trial of hvdlm has failed.
    """
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
            systems = _measure(cluster, config, options, Path(directory))
        results[setup.name] = {
            **describe_run("torchft"),
            "settings": describe_settings(config),
            "systems": systems,
        }
        write_results(path, results)
        write_text(options.output / "recovery.md", table(results))
        if failed := [name for name in HVDLM if systems.get(name, {}).get("failures")]:
            raise HvdlmError(f"{setup.name}: trials of {' and '.join(failed)} failed, see {path}")
    print(table(results))


def _measure(cluster: Cluster, config: Config, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The undisturbed run of each system, then trials of all in turns."""
    systems: dict[str, Any] = {}
    whole: dict[str, dict[int, LoggedStep]] = {}
    for name in options.systems:
        job = SYSTEMS[name](cluster, config, directory / f"{name.replace(' ', '-')}-undisturbed")
        whole[name], seconds = run_undisturbed(job, config.train.steps, directory / f"{name}.log")
        difference = worst_loss_difference(whole[name], whole[options.systems[0]])
        systems[name] = {"step_seconds": seconds, "loss_difference": difference, "trials": [], "failures": []}
        print(f"== {cluster.setup.name}, {name}: {seconds:.3f} s a step, loss within {difference:.1e}", flush=True)
    for seed in range(options.trials):
        plan = make_plan(seed, cluster.setup.ranks, config.train.steps)
        for name, found in systems.items():
            run_dir = directory / f"{name.replace(' ', '-')}-{seed}"
            job = SYSTEMS[name](cluster, config, run_dir)
            log = run_dir.with_suffix(".log")
            try:
                trial, steps = run_trial(
                    job, config.train.steps, config.train.global_batch_size, found["step_seconds"], plan, log
                )
            except HvdlmError as error:
                found["failures"].append({**asdict(plan), "cause": str(error)})
                print(f"== {cluster.setup.name}, {name}, trial {seed}: {_failure(plan, error)}", flush=True)
                continue
            worst = None if trial.samples_lost else worst_loss_difference(steps, whole[name])
            print(f"== {cluster.setup.name}, {name}, trial {seed}: {_sentence(trial)}", flush=True)
            work_lost = trial.steps_repeated * found["step_seconds"]
            found["trials"].append({**asdict(trial), "seconds_repeated": work_lost, "worst_loss_difference": worst})
    return systems


def _sentence(trial: Trial) -> str:
    return (
        f"rank {trial.rank} killed after step {trial.step}, {trial.seconds:.2f} s to the end of a step, "
        f"{trial.steps_repeated} steps repeated, {trial.samples_lost} samples lost, "
        f"ended after {trial.seconds_to_end:.1f} s"
    )


def _failure(plan: Plan, error: HvdlmError) -> str:
    return f"rank {plan.rank} killed after step {plan.step}, {error}"


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="a data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument("--setup", nargs="+", default=SETUPS, help=f"HOSTSxRATE, or {ONE_HOST} (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help=f"of {ONE_HOST}")
    parser.add_argument("--systems", nargs="+", default=tuple(SYSTEMS), choices=SYSTEMS, help="(default: all)")
    parser.add_argument("--trials", type=int, default=20)
    options, overrides = parser.parse_known_args()
    if options.trials < 1 or options.ranks < 2:
        raise HvdlmError("give 1 or more --trials, and 2 or more --ranks")
    return options, overrides


if __name__ == "__main__":
    run_script("recovery.py", lambda: run(*_parse()))
