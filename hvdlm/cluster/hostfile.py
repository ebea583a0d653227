"""Host lists: a host a line, `NAME slots=RANKS`, in the one form that mpirun and horovodrun read alike.

Open MPI takes more than this (user@NAME, `count=`, words that it skips), horovodrun sees other things in it; what is
accepted here means the same to both. Form: https://docs.open-mpi.org/en/v5.0.x/launching-apps/scheduling.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import HvdlmError


@dataclass(frozen=True)
class Host:
    """A host, the ranks that it takes, and its line in the list, counted from 1.

    `states_slots`: does the line say how many? Without, horovodrun reads one, mpirun as many as the host has cores.
    """

    name: str
    slots: int
    line: int
    states_slots: bool = True


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a list, in order; at least one.

    Raises HvdlmError, with file, line and remedy, for whatever a launcher would stumble over.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise HvdlmError(f"cannot read host list {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise HvdlmError(f"host list {path} is not text: write lines such as `h1 slots=4`") from None
    if "\r" in text:
        raise HvdlmError(
            f"host list {path} has Windows line ends, at which mpirun fails: run `sed -i 's/\\r//' {path}`"
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
                f"{path}, line {number}: {host.name} stands in line {earlier.line} already: "
                f"write it once, with the slots of both lines (slots={earlier.slots + host.slots})"
            )
    if not hosts:
        raise HvdlmError(f"host list {path} names no host: write lines such as `h1 slots=4`")
    return list(hosts.values())


def _parse(content: str, number: int) -> Host:
    """One line without its comment; raises ValueError with what is wrong and what to write."""
    name, *words = re.sub(r"\s*=\s*", "=", content).split()
    _check_name(name)
    counts: dict[str, int] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in ("slots", "max_slots", "max-slots") or not equals:
            raise ValueError(f"unknown word {word!r} after the host's name: write `{name} slots=4`")
        key = key.replace("-", "_")
        if key in counts:
            raise ValueError(f"{key} stands twice: write it once")
        if not re.fullmatch("[0-9]+", value):
            raise ValueError(f"{key} must be a number, not {value!r}: write `{name} slots=4`")
        counts[key] = int(value)
    slots = counts.get("slots", 1)
    if slots == 0:
        raise ValueError("a host of no slots takes no rank: give it slots, or comment the line out")
    if counts.get("max_slots", slots) < slots:
        raise ValueError("max_slots is less than slots, which mpirun refuses: raise it, or leave it out")
    return Host(name, slots, number, "slots" in counts)


def _check_name(name: str) -> None:
    if found := re.fullmatch(r"([\w.-]+):([0-9]+)", name, re.ASCII):
        raise ValueError(
            f"NAME:SLOTS is for the command line (-H, --host): write `{found.group(1)} slots={found.group(2)}`"
        )
    if "@" in name:
        raise ValueError(
            f"a user's name has no place here: write `{name.rpartition('@')[2]}`, and `User` into ~/.ssh/config"
        )
    if not re.fullmatch(r"[a-z0-9_]([\w.-]*\w)?", name, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{name!r} is not a host's name or IPv4 address: use letters, digits, dots and hyphens")
