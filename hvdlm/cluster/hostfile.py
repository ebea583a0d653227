"""Reads host lists: one host on each line, `NAME slots=RANKS`.

Only the common subset of mpirun's and horovodrun's formats is accepted, which means the same to both. Open MPI accepts
more (user@NAME, `count=`, and words that it skips): https://docs.open-mpi.org/en/v5.0.x/launching-apps/scheduling.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import HvdlmError


@dataclass(frozen=True)
class Host:
    """A host of a list. `slots`: number of ranks it runs. `line`: its line in the file, from 1.

    `states_slots`: whether the line has `slots=`. Without it, horovodrun assumes 1 slot and mpirun one for each core.
    """

    name: str
    slots: int
    line: int
    states_slots: bool = True


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a list, in order; at least one.

    Raises HvdlmError, with file, line and remedy, for anything that a launcher would reject or misread.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise HvdlmError(f"cannot read host list {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise HvdlmError(f"host list {path} is not text: write lines such as `h1 slots=4`") from None
    if "\r" in text:
        raise HvdlmError(
            f"host list {path} has Windows line endings, which mpirun cannot read: run `sed -i 's/\\r//' {path}`"
        )
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        try:
            host = _parse(content, number)
        except ValueError as error:
            raise HvdlmError(f"{path}, line {number}: {error}, in {content!r}") from None
        earlier = hosts.setdefault(host.name.lower(), host)
        if earlier is not host:
            raise HvdlmError(
                f"{path}, line {number}: {host.name} is also in line {earlier.line}: "
                f"write it once, with the slots of both lines (slots={earlier.slots + host.slots})"
            )
    if not hosts:
        raise HvdlmError(f"host list {path} names no host: write lines such as `h1 slots=4`")
    return list(hosts.values())


def _parse(content: str, number: int) -> Host:
    """Parses a line without its comment; raises ValueError with the error and the remedy."""
    name, *words = re.sub(r"\s*=\s*", "=", content).split()
    _check_name(name)
    counts: dict[str, int] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in ("slots", "max_slots", "max-slots") or not equals:
            raise ValueError(f"unknown word {word!r} after the host's name: write `{name} slots=4`")
        key = key.replace("-", "_")
        if key in counts:
            raise ValueError(f"{key} is given twice: write it once")
        if not re.fullmatch("[0-9]+", value):
            raise ValueError(f"{key} must be a number, not {value!r}: write `{name} slots=4`")
        counts[key] = int(value)
    slots = counts.get("slots", 1)
    if slots == 0:
        raise ValueError("a host with 0 slots runs no rank: give it slots, or comment the line out")
    if counts.get("max_slots", slots) < slots:
        raise ValueError("max_slots is less than slots, which mpirun refuses: raise it, or leave it out")
    return Host(name, slots, number, "slots" in counts)


def _check_name(name: str) -> None:
    """Raises ValueError if `name` is not a host name or IPv4 address."""
    if found := re.fullmatch(r"([\w.-]+):([0-9]+)", name, re.ASCII):
        raise ValueError(
            f"NAME:SLOTS is for the command line (-H, --host): write `{found.group(1)} slots={found.group(2)}`"
        )
    if "@" in name:
        raise ValueError(
            f"a user name is not allowed here: write `{name.rpartition('@')[2]}`, and `User` into ~/.ssh/config"
        )
    if not re.fullmatch(r"[a-z0-9_]([\w.-]*\w)?", name, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{name!r} is not a host's name or IPv4 address: use letters, digits, dots and hyphens")
