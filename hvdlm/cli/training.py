"""`hvdlm new`, `hvdlm train`, `hvdlm privacy`, `hvdlm serve`, `hvdlm verify` and `hvdlm report`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hvdlm.arguments import count, finite, path, path_text
from hvdlm.cli.shared import add_command_with_settings, add_config
from hvdlm.errors import HvdlmError

if TYPE_CHECKING:
    from hvdlm.config import Config


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands for runs."""
    new = commands.add_parser("new", help="make a directory to begin with: settings and commands, explained")
    new.add_argument("directory", type=path, metavar="DIR", help="to be made")
    new.set_defaults(run=_new)

    train = add_command_with_settings(
        commands, "train", help="train a model; start it with horovodrun, mpirun or srun for more than one rank"
    )
    add_config(train)
    train.add_argument("--resume", type=path_text, metavar="latest|PATH", help="go on from a checkpoint of the run")
    train.add_argument("--dry-run", action="store_true", help="print settings, sizes and memory; do not train")
    train.add_argument("--ranks", type=count, metavar="N", help="of --dry-run (default: those that were started)")
    train.set_defaults(run=_train)

    privacy = add_command_with_settings(
        commands, "privacy", help="which noise and batch a run takes for a budget of differential privacy"
    )
    add_config(privacy)
    privacy.add_argument("--epsilon", type=_above_0, required=True, metavar="EPSILON", help="the budget")
    privacy.add_argument("--delta", type=_probability, metavar="DELTA", help="at which (default: privacy.delta)")
    privacy.add_argument(
        "--units", type=count, metavar="N", help="sequences or documents (default: those of the run's data set)"
    )
    privacy.set_defaults(run=_privacy)

    serve = add_command_with_settings(
        commands,
        "serve",
        help="a parameter server, for workers that join and leave: hvdlm train with server.address",
        description="Keeps the model, and trains it by the gradients of workers: `hvdlm train` with --server.address, "
        "on any host and at any time. Needs server.listen and server.max_staleness.",
    )
    add_config(serve)
    serve.add_argument("--resume", type=path_text, metavar="latest|PATH", help="go on from a checkpoint of the run")
    serve.set_defaults(run=_serve)

    verify = commands.add_parser("verify", help="check every hash of a run's checkpoints, and name what is damaged")
    verify.add_argument("path", type=path, nargs="+", metavar="PATH", help="a checkpoint, or a run directory")
    verify.set_defaults(run=_verify)

    report = commands.add_parser("report", help="write one HTML page of what runs have measured, side by side")
    report.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run directories")
    report.add_argument("--output", type=path, metavar="FILE", help="the page (default: report.html in the first run)")
    report.set_defaults(run=_report)


def _new(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.new_run import new

    new(options.directory)
    return 0


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.training.run import dry_run, read_config, train

    config = read_config(options.config, overrides)
    if options.dry_run:
        return dry_run(config, options.ranks)
    if options.ranks is not None:
        raise HvdlmError("--ranks is of --dry-run: a launcher starts ranks, as in mpirun -np 4 hvdlm train ...")
    if config.server.address:
        return _work(config, options.resume)
    if config.server.listen:
        raise HvdlmError("server.listen is of hvdlm serve: start that, and its workers with server.address")
    return train(config, options.resume, options.config)


def _privacy(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.training.privacy_plan import plan
    from hvdlm.training.run import read_config

    plan(read_config(options.config, overrides), options.epsilon, options.delta, options.units)
    return 0


def _above_0(text: str) -> float:
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return number


def _probability(text: str) -> float:
    number = finite(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number between 0 and 1")
    return number


def _work(config: Config, resume: str | None) -> int:
    from hvdlm.training.worker_process import run_worker

    if resume is not None:
        raise HvdlmError("a worker of server.address has nothing to go on from: --resume is of its hvdlm serve")
    return run_worker(config)


def _serve(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.training.run import read_config
    from hvdlm.training.server_process import run_server

    return run_server(read_config(options.config, overrides), options.resume, options.config)


def _verify(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.verify import verify

    return verify(options.path)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.report.run_report import write_report

    return write_report(options.runs, options.output)
