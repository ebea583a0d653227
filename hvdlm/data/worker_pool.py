"""A process pool whose `map` keeps the order of its items and bounds memory."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TypeVar

from hvdlm.errors import HvdlmError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerPool:
    """Context manager with `workers` worker processes; with one worker, the calling process does the work.

    So it does, after a warning, on a host that does not let them be started: one without a usable /dev/shm, where
    their locks are, or whose limit on processes is reached.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = _start_executor(workers) if workers > 1 else None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:
            _kill(self._executor)
        else:
            self._executor.shutdown()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of each item, in the order of the items.

        Memory holds at most two items or results for each worker, however long `items` is and however slowly the
        results are consumed: the next item is taken only then.

        Raises HvdlmError if a worker is killed, and any exception of `function`.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._executor.submit(function, item))
                if len(pending) == 2 * self._workers:
                    yield _result(self._executor, pending.popleft())
            while pending:
                yield _result(self._executor, pending.popleft())
        except BrokenProcessPool:
            _let_go_of_dead_workers(self._executor)
            raise HvdlmError(
                "a worker process was killed, most likely because memory ran out; use fewer --workers (ulimit -u, a "
                "limit on processes, ends them too)"
            ) from None


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Within the block Ctrl-C waits until its end, and processes that are started there never get it.

    It is for the parent alone, which ends its workers: one that is interrupted while it starts prints a traceback.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        yield  # nothing here is interrupted
        return
    held: list[int] = []
    resource_tracker.ensure_running()  # a process that workers need, and whose start would let the signal through again
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, handler)
        if held:
            raise KeyboardInterrupt


def _start_executor(workers: int) -> ProcessPoolExecutor | None:
    """Starts the worker processes; None, after a warning, if this host does not allow it."""
    executor = None
    try:
        # Spawned, not forked: the tokenizers library and h5py have threads and locks that do not survive a fork.
        executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
        with _interrupts_held():
            # Starts all workers now. Python 3.11's executor starts them as work arrives; if another worker is killed at
            # that time, the executor forgets the new one and waits for it forever.
            for _ in range(workers):
                executor.submit(_do_nothing)
    except (OSError, NotImplementedError, RuntimeError) as error:  # RuntimeError: a thread cannot be started
        if executor is not None:
            _end(executor)
        logger.warning("no worker processes can be started (%s), so one does the work; %s", error, _remedy(error))
        return None
    except BaseException:
        if executor is not None:
            _kill(executor)
        raise
    return executor


def _result(executor: ProcessPoolExecutor, future: Future[Result]) -> Result:
    """The result of `future`, whose wait also ends when a worker is killed in the middle of writing its result.

    The executor does not see that: it waits for the rest of the result, and other workers for the lock on the pipe.
    """
    while not wait((future,), timeout=1).done:
        if connection.wait([process.sentinel for process in _processes(executor)], timeout=0):
            _kill_workers(executor)
    return future.result()


def _kill(executor: ProcessPoolExecutor) -> None:
    """For when what the workers do is of no use any more: it might take for ever, as on a file system that hangs."""
    _kill_workers(executor)
    _let_go_of_dead_workers(executor)
    executor.shutdown(cancel_futures=True)


def _kill_workers(executor: ProcessPoolExecutor) -> None:
    for process in _processes(executor):
        process.kill()
    # The executor may be reading a result of which its worker has written a part: it is to see the end of the pipe, of
    # which this process holds the writing side too
    vars(executor)["_result_queue"]._writer.close()


def _processes(executor: ProcessPoolExecutor) -> list[BaseProcess]:
    return list((vars(executor)["_processes"] or {}).values())


def _let_go_of_dead_workers(executor: ProcessPoolExecutor) -> None:
    if sys.version_info < (3, 11, 5):
        # Otherwise the executor waits until someone reads what it has written (python/cpython issue 94777)
        vars(executor)["_call_queue"]._reader.close()


def _remedy(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE:
        return "raise the limit on open files (ulimit -n)"
    if number in (errno.EAGAIN, errno.ENOMEM) or (number is None and not isinstance(error, NotImplementedError)):
        return "raise the limit on processes and threads (ulimit -u), or give fewer --workers"
    return "their locks are in /dev/shm, which must be there, writable, and not full"


def _end(executor: ProcessPoolExecutor) -> None:
    """Ends an executor some of whose workers, or whose own thread, could not be started."""
    manager, processes = vars(executor)["_executor_manager_thread"], list(vars(executor)["_processes"].values())
    if manager is not None and manager.is_alive():
        executor.shutdown(cancel_futures=True)
    for process in processes:  # without its thread the executor would never end them
        process.kill()
        process.join()


def _do_nothing() -> None:
    """Submitted once for each worker, so that the executor starts it."""


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker uses one core
    try:
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    except RuntimeError:  # the limit on processes counts threads too; the parent says that a worker has ended
        os._exit(1)


def _exit_with_parent() -> None:
    """Exits when the parent is killed; the worker, which holds both ends of its queue, would wait forever otherwise."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
