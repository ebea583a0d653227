"""Arguments that several commands have."""

from __future__ import annotations

import argparse

from hvdlm.arguments import path

# Below the help of a command that takes settings
SETTINGS_EPILOG = "Any setting is overridden by --section.key value, as in --train.steps 500."


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """CHECKPOINT, whose model a command reads."""
    command.add_argument(
        "checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory for its latest"
    )


def add_engine(command: argparse.ArgumentParser) -> None:
    """--engine of a command that runs on all ranks of a job."""
    command.add_argument("--engine", default="auto", choices=["auto", "solo", "horovod", "mpi", "torch"])
