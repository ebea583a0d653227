"""What one rank finds out alone becomes known to all: work that may fail on some ranks and not on others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from hvdlm.comm.communicator import Communicator, ReduceOp
from hvdlm.errors import HvdlmError, JobError

T = TypeVar("T")

# How often, in seconds, rank 0 tells the others that it is still at work.
_SIGN_OF_LIFE = 1.0


def together(communicator: Communicator, action: Callable[[], T]) -> T:
    """Runs `action`, which must not communicate, on every rank and returns each rank its own result.

    Raises JobError on every rank if it raised HvdlmError on any.
    """
    outcome: Future[T] = Future()
    try:
        outcome.set_result(action())
    except HvdlmError as error:
        outcome.set_exception(error)
    complaint = outcome.exception()
    raise_together(communicator, communicator.all_gather_object(None if complaint is None else str(complaint)))
    return outcome.result()


def on_first_rank(communicator: Communicator, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 alone and returns its result, which must be picklable, on every rank.

    It may take longer than `comm.timeout`: while it runs, on a thread, rank 0 gives signs of life. Raises JobError on
    every rank if it raised HvdlmError.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        task = thread.submit(action) if communicator.rank == 0 else None
        running = True
        while running:
            still = task is not None and bool(wait([task], timeout=_SIGN_OF_LIFE).not_done)
            running = bool(communicator.all_reduce_(torch.tensor([int(still)]), ReduceOp.MAX))
        result = together(communicator, lambda: None if task is None else task.result())
    return communicator.broadcast_object(result)  # type: ignore[return-value]


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
