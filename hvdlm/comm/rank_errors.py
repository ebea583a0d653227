"""Makes an error of some ranks an error of all: for work that may fail on some ranks and not on others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.errors import HvdlmError, JobError

T = TypeVar("T")

# Seconds between the messages by which rank 0 tells the others that it is still at work.
_HEARTBEAT = 1.0

# How many times `comm.timeout` a task may take before a file system counts as one that does not answer.
_PATIENCE = 10.0


def on_all_ranks(communicator: Communicator, action: Callable[[], T]) -> T:
    """Runs `action`, which must not communicate, on every rank and returns each rank its own result. Collective.

    Raises JobError on every rank if it raised HvdlmError on any.
    """
    outcome: Future[T] = Future()
    try:
        outcome.set_result(action())
    except HvdlmError as error:
        outcome.set_exception(error)
    raised = outcome.exception()
    raise_on_all_ranks(communicator, communicator.all_gather_object(None if raised is None else str(raised)))
    return outcome.result()


def on_rank_0(communicator: Communicator, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 alone and returns its result, which must be picklable, on every rank. Collective.

    It may take longer than `comm.timeout`: it runs on a thread, while rank 0 sends heartbeats. Raises JobError on every
    rank if it raised HvdlmError.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        task = thread.submit(action) if communicator.rank == 0 else None
        wait_for_tasks(communicator, task)
        result = on_all_ranks(communicator, lambda: None if task is None else task.result())
    return communicator.broadcast_object(result)  # type: ignore[return-value]


def wait_for_tasks(communicator: Communicator, task: Future[Any] | None) -> None:
    """Returns when the tasks of all ranks have ended, by whatever outcome and however long they take. Collective."""
    with communicator.activity.within("waits for files", _PATIENCE):
        _wait_for_tasks(communicator, task)


def _wait_for_tasks(communicator: Communicator, task: Future[Any] | None) -> None:
    is_running = True
    while is_running:
        is_running_here = task is not None and bool(wait([task], timeout=_HEARTBEAT).not_done)
        is_running = bool(communicator.all_reduce_(torch.tensor([int(is_running_here)]), ReduceOp.MAX))


def raise_on_all_ranks(communicator: Communicator, errors: list[str | None]) -> None:
    """Raises JobError if any rank has an error; `errors`, by rank, are the same on all."""
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return
    first = errors[failed[0]]
    if len(failed) == communicator.size or failed == [0]:
        raise JobError(str(first))
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    raise JobError(f"rank {failed[0]} on {communicator.hosts[failed[0]]}{others}: {first}")
