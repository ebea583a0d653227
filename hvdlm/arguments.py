"""Words of a command line: paths, numbers, and settings among the options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.paths import expand_path

_DURATION = re.compile(r"(\d+(?:\.\d*)?)\s*(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}

_LARGEST_PORT = 65535
_HOST_AND_PORT = re.compile(r"(\[[^\s\[\]]+\]|[^\s\[\]:]*):([0-9]{1,5})")

_OVERRIDE = re.compile(r"--[A-Za-z_]\w*\.[^=]+(=.*)?", re.DOTALL)


def path_text(text: str) -> str:
    """A path; an empty one is that of a shell variable which nobody has set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path (was a shell variable not set?)")
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    return Path(path_text(text))  # an empty path would mean the current directory


def finite(text: str) -> float:
    """A number that is not infinite or NaN, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def seed(text: str) -> int:
    """The seed of a generator, for argparse: train.seed has the same bounds."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 to 2^63 - 1")
    return int(text)


def count(text: str) -> int:
    """A number of things of which there is at least one, for argparse."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    """Seconds of a wait, for argparse; more than a million is no wait that a library could be given."""
    number = finite(text)
    if not 0 < number <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds above 0, at most 1000000")
    return number


def duration(text: str) -> float:
    """Seconds of a text such as 90s, 30min or 1.5h. Raises ValueError if it is none."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r}: give a number of steps, or a time such as '90s', '30min' or '2h'")
    return float(match[1]) * _SECONDS[match[2]]


def host_and_port(text: str) -> tuple[str, int]:
    """Those of HOST:PORT, where an IPv6 address stands in brackets. Raises ValueError for another text."""
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None or int(match[2]) > _LARGEST_PORT:
        raise ValueError(f"{text!r}: give HOST:PORT, as in host1:7000")
    return match[1].strip("[]"), int(match[2])


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings, `--section.key value` or `--section.key=value`, and the other words of a command line.

    argparse knows no settings: it would take the value of one for the configuration, if that follows.
    """
    overrides, words = [], []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += [word, *rest]
            break
        if not _OVERRIDE.fullmatch(word):
            words.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not _OVERRIDE.fullmatch(rest[0]):
            overrides.append(rest.pop(0))
    return overrides, words


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`--train.steps 5 --optimizer.lr=1e-3` as pairs of key and text. Raises HvdlmError for other words."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in name:
            raise HvdlmError(f"unknown argument {flag!r}: settings are overridden as --section.key value")
        if not equals:
            if not rest:
                raise HvdlmError(f"--{name} needs a value: --{name} VALUE")
            value = rest.pop(0)
        if not value.isprintable() and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
            raise HvdlmError(f"--{name} is not UTF-8: {value!r}")  # bytes that Python could not decode
        pairs.append((name, value))
    return pairs
