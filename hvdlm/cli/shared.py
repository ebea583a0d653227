"""Arguments that several commands have."""

from __future__ import annotations

import argparse

from hvdlm.arguments import path

# Below the help of a command that takes settings
_SETTINGS_EPILOG = "Any setting is overridden by --section.key value, as in --train.steps 500."


def add_command_with_settings(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, description: str | None = None
) -> argparse.ArgumentParser:
    """A command whose settings can be overridden."""
    return commands.add_parser(name, help=help, description=description, epilog=_SETTINGS_EPILOG, allow_abbrev=False)


def add_config(command: argparse.ArgumentParser, what_of_it: str = "") -> None:
    """CONFIG, its settings."""
    command.add_argument("config", type=path, metavar="CONFIG", help=f"TOML file of settings{what_of_it}")


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """CHECKPOINT, whose model a command reads."""
    command.add_argument(
        "checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory for its latest"
    )


def add_engine(command: argparse.ArgumentParser) -> None:
    """--engine of a command that runs on all ranks of a job."""
    command.add_argument("--engine", default="auto", choices=["auto", "solo", "horovod", "mpi", "torch"])
