"""`hvdlm prepare` and `hvdlm inspect`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hvdlm.arguments import finite, path, path_text, seed

if TYPE_CHECKING:
    from hvdlm.data.mixture import WeightedPath


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands for data sets."""
    prepare = commands.add_parser("prepare", help="turn text into a data set of HDF5 shards")
    paths: dict[str, Any] = {"type": path_text, "nargs": "+", "action": "extend", "metavar": "PATH"}
    given = prepare.add_mutually_exclusive_group(required=True)
    given.add_argument("--input", **paths, default=[], help="files, directories, globs, or python-stdlib")
    given.add_argument(
        "--mix",
        type=_weighted_path,
        nargs="+",
        action="extend",
        default=[],
        metavar="WEIGHT=PATH",
        help="sources that are drawn from in proportion to weights, each as --input has it, as 0.7=code 0.3=wiki",
    )
    prepare.add_argument("--output", type=path, required=True, metavar="DIR", help="the data set's directory")
    prepare.add_argument("--tokenizer", default="byte", metavar="byte|bpe:VOCAB|FILE", help="default: byte")
    prepare.add_argument(
        "--tokenizer-pattern",
        choices=("gpt2", "p50k_base", "cl100k_base", "o200k_base", "llama3"),
        help="how a rank file of tiktoken divides text (default: as the published file of as many ranks)",
    )
    prepare.add_argument("--shards", type=int, default=8, metavar="N", help="training shards of a source (default: 8)")
    prepare.add_argument("--validation", type=float, metavar="FRACTION", help="of documents, or of one (default: 0.01)")
    prepare.add_argument("--validation-input", **paths, default=[], help="files for validation, in place of a fraction")
    prepare.add_argument("--split", metavar="blank-lines|lines|BYTES", help="divide text files into documents")
    prepare.add_argument("--workers", type=int, default=0, metavar="W", help="processes (default: one a core)")
    prepare.add_argument(
        "--text-key", default="text", metavar="KEY", help="of records, or column of tables (default: text)"
    )
    prepare.add_argument("--seed", type=seed, default=0, help="of the split into shards and validation")
    prepare.add_argument("--skip-bad", action="store_true", help="count bad documents and go on")
    prepare.set_defaults(run=_prepare)

    inspect = commands.add_parser("inspect", help="print what a data set holds")
    inspect.add_argument("data", type=path, metavar="DIR")
    inspect.add_argument("--verify", action="store_true", help="read everything and check every hash")
    inspect.set_defaults(run=_inspect)


def _prepare(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.data.prepare import prepare

    prepare(
        inputs=options.input,
        output=options.output,
        tokenizer=options.tokenizer,
        shards=options.shards,
        validation=(0.0 if options.validation_input else 0.01) if options.validation is None else options.validation,
        workers=options.workers,
        text_key=options.text_key,
        seed=options.seed,
        skip_bad=options.skip_bad,
        split=options.split,
        validation_inputs=options.validation_input,
        mix=options.mix,
        tokenizer_pattern=options.tokenizer_pattern,
    )
    return 0


def _weighted_path(text: str) -> WeightedPath:
    """`WEIGHT=PATH`, for argparse."""
    from hvdlm.data.mixture import WeightedPath

    weight, equals, rest = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: give WEIGHT=PATH, as 0.7=texts/code")
    number = finite(weight)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the weight must be above 0")
    return WeightedPath(number, path_text(rest))


def _inspect(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.data.inspect import inspect

    inspect(options.data, verify=options.verify)
    return 0
