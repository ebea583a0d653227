"""`hvdlm launch`: a job on a cluster of Ray or Spark."""

from __future__ import annotations

import argparse

from hvdlm.cli.shared import add_command_with_settings, add_config
from hvdlm.errors import HvdlmError


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    launch = add_command_with_settings(commands, "launch", help="train on a cluster of Ray or Spark that is up")
    launch.add_argument("cluster", choices=["ray", "spark"])
    add_config(launch)
    launch.add_argument("--ranks", type=int, required=True, metavar="N")
    launch.add_argument("--cpus-per-rank", type=int, metavar="C", help="default: 1; with Ray")
    launch.add_argument("--gpus-per-rank", type=int, metavar="G", help="default: 0; with Ray")
    launch.add_argument("--restarts", type=int, default=3, metavar="K", help="after failures (default: 3)")
    launch.add_argument("--address", default="", help="of the cluster, as ray.init takes it, or a Spark master")
    launch.set_defaults(run=_launch)


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.launch.job import make_job
    from hvdlm.training.initial_weights import shape_of

    cpus, gpus = options.cpus_per_rank, options.gpus_per_rank
    if options.cluster == "spark" and (cpus, gpus) != (None, None):
        raise HvdlmError("--cpus-per-rank and --gpus-per-rank are for Ray: Spark has spark.task.cpus and its resources")
    try:
        if options.cluster == "ray":
            from hvdlm.launch.ray import train
        else:
            from hvdlm.launch.spark import train
    except ModuleNotFoundError as error:
        remedy = f'pip install -c constraints.txt -e ".[{options.cluster}]"'
        raise HvdlmError(f"{options.cluster} is not installed ({error}): {remedy}") from None
    numbers = options.ranks, 1 if cpus is None else cpus, 0 if gpus is None else gpus, options.restarts
    job = make_job(options.config, overrides, *numbers, shape_of)
    return train(job, options.address or ("auto" if options.cluster == "ray" else ""))
