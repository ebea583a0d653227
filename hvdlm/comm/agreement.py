"""What must be the same on all ranks of a job, compared at its start: one rank that differs would spoil the others."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import hvdlm
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError, LeftOutError
from hvdlm.errors import JobError

_MAX_NAMED_RANKS = 8


class Shared(NamedTuple):
    """Something that all ranks must share: what this rank has, and what to do where another has something else."""

    value: str
    remedy: str


def check_ranks_match(communicator: Communicator, config_digest: str) -> None:
    """Raises JobError on every rank unless all run the same software with equal `config_digest`s. Collective."""
    settings = Shared(config_digest[:12], "give all ranks the same configuration")
    check_alike(communicator, {**own_software(), "settings": settings})


def own_software() -> dict[str, Shared]:
    """Versions of what must be one on all ranks, by subject."""
    install = "install one version on all hosts"
    return {
        "hvdlm": Shared(hvdlm.__version__, install),
        "the source code of hvdlm": Shared(_source_digest(), "give all hosts one checkout or installation of it"),
        "torch": Shared(str(torch.__version__), install),
        "Python": Shared(platform.python_version(), install),
    }


def check_alike(communicator: Communicator, own: Mapping[str, Shared]) -> None:
    """Raises JobError on every rank unless all have the values of rank 0, by subject. Collective.

    If ranks differ that are about to join others, only these end: they raise LeftOutError, the others DeadRankError.
    """
    everyone = communicator.all_gather_object({subject: shared.value for subject, shared in own.items()})
    are_new = communicator.all_gather_object(communicator.is_new) if communicator.supports("join") else []
    for subject in own:
        values = [each.get(subject, "nothing like it") for each in everyone]  # in another hvdlm
        expected = values[0]
        different = [rank for rank in range(communicator.size) if values[rank] != expected]
        if different:
            examples = ", ".join(
                f"rank {rank} on {communicator.hosts[rank]} has {values[rank]}" for rank in different[:_MAX_NAMED_RANKS]
            )
            sentence = (
                f"ranks differ in {subject}: rank 0 on {communicator.hosts[0]} has {expected}, {examples}"
                f"{' and so on' if len(different) > _MAX_NAMED_RANKS else ''}; {own[subject].remedy}"
            )
            if are_new and all(are_new[rank] for rank in different):
                raise (LeftOutError if communicator.rank in different else DeadRankError)(sentence)
            raise JobError(sentence)


@functools.cache
def _source_digest() -> str:
    """12 digits of a hash of hvdlm's Python files: two checkouts may differ under one version."""
    folder = Path(hvdlm.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
