"""The options of `hvdlm prepare`, checked before any work."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

from hvdlm.data.mixture import Mixture, WeightedPath
from hvdlm.data.tokenizer import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, Tokenizer
from hvdlm.errors import HvdlmError

MOST_WORKERS = 1024
OTHER_FILES = 256  # open at once, beside those of shards: modules, pipes to workers, input


def check_options(
    inputs: Sequence[str],
    mix: Sequence[WeightedPath],
    shards: int,
    validation: float,
    workers: int,
    validation_inputs: Sequence[str],
) -> None:
    """Raises HvdlmError for options of which nothing could be made, whatever the input is."""
    if bool(inputs) == bool(mix):
        raise HvdlmError("give --input, or --mix for sources with weights: one of the two")
    if len({each.path for each in mix}) < len(mix):
        twice = next(each.path for each in mix if [other.path for other in mix].count(each.path) > 1)
        raise HvdlmError(f"--mix names {twice} twice: give it once, with one weight")
    if mix:
        Mixture([each.weight for each in mix])  # raises HvdlmError for weights that are none
    if shards < 1:
        raise HvdlmError(f"--shards {shards}: there must be at least 1")
    if not 0 <= validation < 1:
        raise HvdlmError(f"--validation {validation}: the fraction must be at least 0 and below 1")
    if validation and validation_inputs:
        raise HvdlmError(
            f"--validation {validation} and --validation-input: give one of them; "
            "the files of --validation-input are all of validation"
        )
    if not 0 <= workers <= MOST_WORKERS:
        raise HvdlmError(
            f"--workers {workers}: give a number of processes, at most {MOST_WORKERS:,}, or 0 for one for each core"
        )
    _allow_open_files(shards, max(len(mix), 1))


def _allow_open_files(shards: int, sources: int) -> None:
    """Raises the limit of open files to what a file for each shard needs. Raises HvdlmError if that is too high."""
    needed = shards * sources + OTHER_FILES + sources
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise HvdlmError(
            f"--shards {shards}{f' for each of {sources} sources' if sources > 1 else ''}: a process may open {hard:,} "
            "files here, and each shard is one; "
            "give fewer, or raise the limit, ulimit -Hn"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def tokenizer_choice(name: str, pattern: str | None) -> Tokenizer | int:
    """The tokenizer that `name` selects, or the vocabulary size of one that is still to be trained.

    `pattern`: of a rank file of tiktoken, or None.
    """
    if pattern is not None and (name == "byte" or name.startswith("bpe:")):
        raise HvdlmError(f"--tokenizer-pattern is for rank files of tiktoken, and --tokenizer {name} is none")
    if name == "byte":
        return Tokenizer.byte()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isascii() or not size.isdigit() or not SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY:
            raise HvdlmError(
                f"--tokenizer {name}: the vocabulary must be a number of at least {SMALLEST_VOCABULARY} "
                f"and at most {LARGEST_VOCABULARY:,}"
            )
        return int(size)
    if not Path(name).exists():
        raise HvdlmError(f"--tokenizer {name}: no such file; give byte, bpe:VOCAB or the path of a tokenizer.json")
    return Tokenizer.open(Path(name), pattern)


def check_output_outside_inputs(inputs: Sequence[str], output: Path) -> None:
    for name in inputs:
        directory = Path(name).resolve()
        if directory.is_dir() and directory in (output.resolve(), *output.resolve().parents):
            raise HvdlmError(
                f"--output {output} lies in the input directory {name}, so it would be read as input next time"
            )
