"""A function applied by several processes, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from hvdlm.errors import HvdlmError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerPool:
    """Context manager over `workers` processes; with one worker, the calling process does the work."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # Spawned, not forked: the tokenizers library and h5py have threads and locks that do not survive a fork.
        self._executor = (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
            if workers > 1
            else None
        )
        if self._executor:
            # All workers now: one that is started just when another is killed would be forgotten, and waited for, for
            # ever (Python 3.11's executor starts them as work comes)
            for _ in range(workers):
                self._executor.submit(_begin)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of each item, in the order of the items.

        An item is drawn only when a worker will soon be free for it, so that memory holds two items and results a
        worker, however long `items` is and however slow the reader of the results.

        Raises HvdlmError if a worker is killed, and whatever `function` raises.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._executor.submit(function, item))
                if len(pending) == 2 * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            if sys.version_info < (3, 11, 5):
                # The executor would wait until what it is writing has been read (python/cpython issue 94777)
                vars(self._executor)["_call_queue"]._reader.close()
            raise HvdlmError(
                "a worker process was killed, most likely because memory ran out; use fewer --workers"
            ) from None


def _begin() -> None:
    """Work for a worker that has none yet."""


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers hold both ends of their queue, so they would wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
