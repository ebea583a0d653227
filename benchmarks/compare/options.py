"""Arguments of scripts that measure systems round by round."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.script import RESULTS, absolute_path
from common.setups import ONE_HOST
from hvdlm.errors import HvdlmError


def measuring_parser(description: str | None, setups: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of the data set, the output directory and the set-ups, which are these if none is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="a data set of hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument(
        "--setup", nargs="+", default=setups, help=f"HOSTSxRATE, or {ONE_HOST} (default: {' '.join(setups)})"
    )
    parser.add_argument("--ranks", type=int, default=2, help=f"of {ONE_HOST}; other set-ups have one per host")
    return parser


def add_rounds(parser: argparse.ArgumentParser, micro_batches: int, rounds: int, steps: int) -> None:
    """Adds how much is measured, with these defaults."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="measured steps of each system in a round")
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=micro_batches,
        metavar="N",
        help="for each rank and step; the stages of a pipeline are given those of all ranks (default: %(default)s)",
    )


def parse(parser: argparse.ArgumentParser, quick: tuple[int, int]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and settings to override; `quick`: rounds and steps of --quick. Raises HvdlmError for numbers that make
    no measurement.
    """
    rounds, steps = quick
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{rounds} rounds of {steps} step{'s' if steps > 1 else ''}: for a first look only",
    )
    options, overrides = parser.parse_known_args()
    if options.quick:
        options.rounds, options.steps = quick
    if min(options.rounds, options.steps, options.micro_batches) < 1 or options.ranks < 2:
        raise HvdlmError("give 1 or more --rounds, --steps and --micro-batches, and 2 or more --ranks")
    return options, overrides
