"""`hvdlm new`, `hvdlm train`, `hvdlm verify` and `hvdlm report`."""

from __future__ import annotations

import argparse

from hvdlm.arguments import count, path, path_text
from hvdlm.cli.shared import SETTINGS_EPILOG
from hvdlm.errors import HvdlmError


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands for runs."""
    new = commands.add_parser("new", help="make a directory to begin with: settings and commands, explained")
    new.add_argument("directory", type=path, metavar="DIR", help="to be made")
    new.set_defaults(run=_new)

    train = commands.add_parser(
        "train",
        help="train a model; start it with horovodrun, mpirun or srun for more than one rank",
        epilog=SETTINGS_EPILOG,
        allow_abbrev=False,
    )
    train.add_argument("config", type=path, metavar="CONFIG", help="TOML file of settings")
    train.add_argument("--resume", type=path_text, metavar="latest|PATH", help="go on from a checkpoint of the run")
    train.add_argument("--dry-run", action="store_true", help="print settings, sizes and memory; do not train")
    train.add_argument("--ranks", type=count, metavar="N", help="of --dry-run (default: those that were started)")
    train.set_defaults(run=_train)

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
    return train(config, options.resume, options.config)


def _verify(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.verify import verify

    return verify(options.path)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.report.run_report import write_report

    return write_report(options.runs, options.output)
