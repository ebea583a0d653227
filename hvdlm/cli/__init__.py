"""The `hvdlm` command: parses and dispatches, nothing else.

Packages are imported only when their command runs, so that `hvdlm --help` need not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import hvdlm
from hvdlm.arguments import split_overrides
from hvdlm.cli import cluster, data, launch, models, scaling, training
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import INTERRUPTED
from hvdlm.output import product_status, tolerant_output

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 after an error sentence, 130 after Ctrl-C."""
    with tolerant_output() as stdout:
        overrides, words = split_overrides(sys.argv[1:] if arguments is None else arguments)
        parser = _parser()
        options, rest = parser.parse_known_args(words)
        takes_overrides = options.command in ("train", "privacy", "serve", "slurm", "kubernetes", "launch", "predict")
        if not takes_overrides and (overrides or rest):
            parser.error(f"unrecognized arguments: {' '.join([*rest, *overrides])}")
        _set_up_logging(options.traceback)
        try:
            status: int = options.run(options, [*rest, *overrides])
        except HvdlmError as error:
            logger.error("%s", error, exc_info=options.traceback)
            return 1
        except KeyboardInterrupt:
            return INTERRUPTED
        if options.command in _PRINTS_ON_THE_WAY and not getattr(options, "dry_run", False):
            return status
        lost, sentence = product_status(stdout)
        if sentence:
            logger.error("%s", sentence)
        return status or lost


# Commands whose product is not what they print
_PRINTS_ON_THE_WAY = ("new", "train", "serve", "prepare", "slurm", "install-horovod", "wheelhouse", "fabric", "launch")


def _set_up_logging(show_tracebacks: bool) -> None:
    """`hvdlm: message` for information, `hvdlm: error: message` for an error, on stderr."""
    names = {logging.DEBUG: "debug: ", logging.INFO: "", logging.WARNING: "warning: ", logging.ERROR: "error: "}
    for level, name in names.items():
        logging.addLevelName(level, name)
    logging.basicConfig(format="hvdlm: %(levelname)s%(message)s")
    logging.getLogger("hvdlm").setLevel(logging.DEBUG if show_tracebacks else logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hvdlm", description=hvdlm.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hvdlm {hvdlm.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (training, data, models, cluster, scaling):
        group.add_commands(commands)
    launch.add_command(commands)
    return parser
