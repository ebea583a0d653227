"""Engine `mpi`: collectives and messages of mpi4py, for ranks started by mpirun or srun.

Collectives run on a communication thread, one after the other in the order of their submission, so they
overlap with computation and every rank runs them in the same order. Messages between two ranks start at once.

A blocking MPI call spins on its core until the slowest rank has called it, and where the cores also compute,
spinning slows down the rank it waits for. So before each collective the ranks enter a non-blocking barrier that
is polled with short sleeps; the collective itself runs when all ranks have entered it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout  # the built-in one from Python 3.11 on
from typing import NoReturn, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor

from hvdlm.comm.communicator import Communicator, ReduceOp, Work
from hvdlm.comm.failure import lost_rank_errors, timeout_error, wait_until
from hvdlm.errors import HvdlmError

T = TypeVar("T")

_OPS = {ReduceOp.SUM: MPI.SUM, ReduceOp.MAX: MPI.MAX}

# MPI has neither IEEE half nor bfloat16 among its standard datatypes.
_REDUCIBLE = frozenset({torch.float32, torch.int32, torch.int64, torch.uint8})

# Bytes of a message of all-to-all, below Open MPI's eager limit as launch.py sets it; and the tag of these messages,
# which keeps them apart from those of `send`.
_MESSAGE = 256 * 1024
_TAG = 1


class MPICommunicator(Communicator):
    """Ranks of an MPI communicator. Needs MPI_THREAD_MULTIPLE, which Open MPI and MPICH give by default."""

    engine = "mpi"
    capabilities = frozenset({"send", "split"})

    def __init__(self, timeout: float, group: MPI.Comm | None = None) -> None:
        """`timeout`: seconds that a rank waits for the others before it gives up."""
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise HvdlmError(
                f"{MPI.Get_library_version().splitlines()[0]} gives no MPI_THREAD_MULTIPLE, which engine mpi needs to "
                "communicate while it computes: use an MPI built with threads, or comm.engine = 'torch'"
            )
        super().__init__()
        # A duplicate keeps our messages apart from those of other MPI code in this process.
        self._group = MPI.COMM_WORLD.Dup() if group is None else group
        self._timeout = timeout
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hvdlm-mpi")
        self.rank, self.size = self._group.Get_rank(), self._group.Get_size()
        self._locate()

    def _split(self, color: int, key: int) -> Communicator:
        return MPICommunicator(self._timeout, self._submit(lambda: self._group.Split(color, key)).wait())

    def abort(self, reason: str) -> NoReturn:
        print(reason, file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # MPI_Abort may return before the launcher's signal arrives

    def _close(self) -> None:
        self._submit(lambda: None).wait()
        self._thread.shutdown()
        self._group.Free()

    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool:
        return dtype in _REDUCIBLE

    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]:
        return self._submit(lambda: self._group.Allreduce(MPI.IN_PLACE, flat.numpy(), _OPS[op]))

    def _reduce_scatter(self, flat: Tensor, op: ReduceOp, lengths: Sequence[int]) -> Work[Tensor]:
        part = flat.new_empty(lengths[self.rank])

        def run() -> Tensor:
            self._group.Reduce_scatter(flat.numpy(), part.numpy(), list(lengths), _OPS[op])
            return part

        return self._submit(run)

    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]:
        gathered = data.new_empty(sum(lengths))

        def run() -> Tensor:
            self._group.Allgatherv(data.numpy(), [gathered.numpy(), list(lengths)])
            return gathered

        return self._submit(run)

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        """By messages of at most `_MESSAGE` bytes between all pairs: `Alltoallv` took up to twice as long, and spins.

        Each rank begins with the next one, so that not all send to the same rank at a time.
        """
        received = [parts[self.rank].new_empty(length) for length in lengths]
        received[self.rank].copy_(parts[self.rank])
        works: list[Work[None]] = []
        for distance in range(1, self.size):
            source, target = (self.rank - distance) % self.size, (self.rank + distance) % self.size
            for piece in _messages(received[source]):
                works.append(self._poll(self._group.Irecv(piece.numpy(), source, _TAG), f"rank {source} to send"))
            for piece in _messages(parts[target]):
                works.append(self._poll(self._group.Isend(piece.numpy(), target, _TAG), f"rank {target} to receive"))

        def finish() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return Work(finish)

    def _broadcast(self, data: Tensor, root: int) -> Work[None]:
        return self._submit(lambda: self._group.Bcast(data.numpy(), root))

    def _send(self, data: Tensor, destination: int) -> Work[None]:
        return self._poll(self._group.Isend(data.numpy(), destination), f"rank {destination} to receive")

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        return self._poll(self._group.Irecv(data.numpy(), source), f"rank {source} to send")

    def _submit(self, collective: Callable[[], T]) -> Work[T]:
        """Queues a collective for the communication thread."""

        def run() -> T:
            with lost_rank_errors(self.engine, self.rank, MPI.Exception):
                wait_until(self._group.Ibarrier().Test, self._timeout, self.rank, "the other ranks")
                return collective()

        future = self._thread.submit(run)

        def finish() -> T:
            try:
                return future.result(self._timeout)
            except WaitTimeout:  # in the collective itself: a rank has stopped after the barrier
                raise timeout_error(self._timeout, self.rank, "the other ranks") from None

        return Work(finish)

    def _poll(self, request: MPI.Request, what: str) -> Work[None]:
        # mpi4py: a request that has ended becomes MPI_REQUEST_NULL, whose Test is true again
        def finish() -> None:
            with lost_rank_errors(self.engine, self.rank, MPI.Exception):
                wait_until(request.Test, self._timeout, self.rank, what)

        return Work(finish)


def _messages(data: Tensor) -> tuple[Tensor, ...]:
    return data.split(_MESSAGE) if len(data) else ()
