"""A job of ranks that a cluster starts: its settings, and its attempts until it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.config_reader import load, with_absolute_paths, with_values
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.launch.rank import Outcome
from hvdlm.model.presets import PRESETS

logger = logging.getLogger(__name__)


class RanksLostError(Exception):
    """The cluster has lost processes of an attempt."""


@dataclass(frozen=True)
class Job:
    """What is to be done by whom."""

    settings: str
    """TOML, with train.ranks: the job is refused if fewer come up."""
    ranks: int
    cpus_per_rank: int
    gpus_per_rank: int
    restarts: int


def make_job(
    config: Path,
    overrides: Sequence[str],
    ranks: int,
    cpus_per_rank: int = 1,
    gpus_per_rank: int = 0,
    restarts: int = 3,
    shape_of: Callable[[str], Mapping[str, Any]] | None = None,
) -> Job:
    """`config`, `overrides`, `shape_of`: as for `hvdlm.config_reader.load`.

    Raises HvdlmError for an error in the settings or the numbers.
    """
    if min(ranks, cpus_per_rank) < 1 or restarts < 0 or gpus_per_rank not in (0, 1):
        raise HvdlmError("--ranks and --cpus-per-rank are 1 or more, --gpus-per-rank is 0 or 1, --restarts 0 or more")
    settings = load(config, overrides, PRESETS, shape_of)
    if settings.train.ranks not in (0, ranks):
        raise HvdlmError(f"train.ranks = {settings.train.ranks}, but --ranks {ranks}: give as many")
    if settings.comm.elastic:
        raise HvdlmError("comm.elastic: ranks that are started so cannot outlive one another; leave it out")
    resolved = with_values(with_absolute_paths(settings, PRESETS), {"train": {"ranks": ranks}}, PRESETS)
    return Job(resolved.to_toml(), ranks, cpus_per_rank, gpus_per_rank, restarts)


def run_attempts(job: Job, attempt: Callable[[], list[Outcome]]) -> int:
    """Starts all ranks, again from the newest checkpoint if some were killed, and returns the job's exit status.

    `attempt`: returns what has become of all ranks, of which none outlives another for long. Raises HvdlmError if
    ranks have ended with an error, which would come again, or were killed more often than may be.
    """
    for number in range(job.restarts + 1):
        try:
            outcomes = attempt()
        except RanksLostError as error:
            said = str(error)
        else:
            killed = [rank for rank, each in enumerate(outcomes) if each.status < 0]
            failed = [rank for rank, each in enumerate(outcomes) if each.status not in (0, STOPPED_EARLY)]
            if not failed:
                return max(each.status for each in outcomes)
            if not killed:
                # of an error that all have met, rank 0 alone speaks, and another may end before it
                first = min(failed, key=lambda rank: (not _error(outcomes[rank].last), outcomes[rank].end))
                raise HvdlmError(f"rank {first} ended with {outcomes[first].status}: {_sentence(outcomes[first].last)}")
            said = f"rank {killed[0]} was killed by signal {-outcomes[killed[0]].status}"
        logger.warning("attempt %d of %d: %s", number + 1, job.restarts + 1, said)
    raise HvdlmError(f"the job was lost {job.restarts + 1} times (--restarts); the last time {said}")


def _error(said: str) -> str:
    """The error in what a rank has said last; empty: none."""
    return next((line for line in said.splitlines() if line.startswith("hvdlm: error: ")), "")


def _sentence(said: str) -> str:
    """The error, or the last line."""
    return _error(said) or (said.strip().splitlines() or ["it said nothing"])[-1]
