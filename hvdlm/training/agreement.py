"""What one rank finds out alone becomes known to all: work that may fail on some ranks and not on others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hvdlm.comm.communicator import Communicator
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError

T = TypeVar("T")


def together(communicator: Communicator, action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and returns what it returned on each, in the order of ranks; picklable.

    Raises JobError on every rank if it raised HvdlmError on any. `action` must not communicate.
    """
    result: T | None = None
    complaint: str | None = None
    try:
        result = action()
    except HvdlmError as error:
        complaint = str(error)
    outcomes = communicator.all_gather_object((result, complaint))
    raise_together(communicator, [complaint for _, complaint in outcomes])
    return [value for value, _ in outcomes]  # type: ignore[misc]


def on_first_rank(communicator: Communicator, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 alone and returns its result, which must be picklable, on every rank."""
    return together(communicator, lambda: action() if communicator.rank == 0 else None)[0]  # type: ignore[return-value]


def raise_together(communicator: Communicator, complaints: list[str | None]) -> None:
    """Raises JobError if any rank complains; `complaints`, by rank, are the same on all."""
    loud = [rank for rank, complaint in enumerate(complaints) if complaint is not None]
    if not loud:
        return
    first = complaints[loud[0]]
    if len(loud) == communicator.size or loud == [0]:
        raise JobError(str(first))
    others = f" (and {len(loud) - 1} more ranks)" if len(loud) > 1 else ""
    raise JobError(f"rank {loud[0]} on {communicator.hosts[loud[0]]}{others}: {first}")


def open_data(communicator: Communicator, path: Path) -> DataSet:
    """Opens a data set on every rank, or raises JobError on all."""
    opened: list[DataSet] = []
    together(communicator, lambda: opened.append(DataSet(path)))
    return opened[0]
