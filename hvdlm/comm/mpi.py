"""Engine `mpi`: collectives and messages of mpi4py, for ranks started by mpirun or srun.

Collectives run on a communication thread, one after the other in the order of their submission, so they
overlap with computation and every rank runs them in the same order. Messages between two ranks start at once. Of
a communicator that `is_inline` the calling thread runs collectives: a computation that waits for each of them saves the
20 us of two changes of threads (benchmarks/LOG.md).

A blocking MPI call spins on its core until the slowest rank has called it, and where the cores also compute,
spinning slows down the rank it waits for. So before each collective the ranks enter a non-blocking barrier that
is polled with short sleeps; the collective itself runs when all ranks have entered it.

MPI counts in 32 bits, so longer messages go in pieces.

Where mpirun was told `--with-ft ulfm`, a rank that dies does not end the others: their operations raise errors, and
`regroup_` leaves it out (MPI 5, chapter on process fault tolerance; Bland et al., "Post-failure recovery of MPI
communication capability", IJHPCA 2013). MPI_Finalize would then wait for the dead for ever (Open MPI issue 11404), so
ranks exit without it.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

import mpi4py
import numpy as np
import torch
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError, LostRankError, lost_rank_errors, result_within, say, wait_until
from hvdlm.comm.payload import copy_back
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.work import Work
from hvdlm.errors import HvdlmError

# What mpirun --with-ft ulfm tells its ranks
CAN_SHRINK = os.environ.get("OMPI_MCA_mpi_ft_enable", "") in ("1", "true", "yes")  # noqa: SIM112
mpi4py.rc.finalize = not CAN_SHRINK

from mpi4py import MPI  # noqa: E402  which calls MPI_Init

T = TypeVar("T")

_OPS = {ReduceOp.SUM: MPI.SUM, ReduceOp.MAX: MPI.MAX}
_REDUCE = {ReduceOp.SUM: np.add, ReduceOp.MAX: np.maximum}

# MPI has neither IEEE half nor bfloat16 among its standard datatypes.
_REDUCIBLE = frozenset({torch.float32, torch.int32, torch.int64, torch.uint8})

# Bytes of one call of MPI. Counts and displacements end at 2**31 - 1, of elements or bytes; Open MPI 5.0 has none of
# the calls of MPI 4 with longer ones.
LARGEST_MESSAGE = 2**30

# Classes of errors that MPI finds in the arguments of a call, whatever other ranks do: bugs.
_WRONG_ARGUMENTS = frozenset(
    {
        *(MPI.ERR_BUFFER, MPI.ERR_COUNT, MPI.ERR_TYPE, MPI.ERR_TAG, MPI.ERR_COMM, MPI.ERR_RANK, MPI.ERR_ROOT),
        *(MPI.ERR_GROUP, MPI.ERR_OP, MPI.ERR_ARG, MPI.ERR_REQUEST),
    }
)

# Bytes of a message between hosts, below Open MPI's eager limit as connect.py sets it: longer ones, also those of
# `Allreduce`, attain half of a link that both of two ranks send over (benchmarks/LOG.md)
_MESSAGE = 256 * 1024

# Bytes from which on `Allreduce` sends such messages
_LONG = 2 * _MESSAGE

# Tags of messages of all-to-all, and of those of parts that ranks own, which keep them apart from those
# of `send` and from each other
_TAG, _PARTS_TAG = 1, 2


class MPICommunicator(Communicator):
    """Ranks of an MPI communicator. Needs MPI_THREAD_MULTIPLE, which Open MPI and MPICH give by default."""

    engine = "mpi"
    capabilities = frozenset({"send", "split", "shrink"} if CAN_SHRINK else {"send", "split"})

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
        self._is_revoked = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hvdlm-mpi")
        self.rank, self.size = self._group.Get_rank(), self._group.Get_size()
        self.node_count = 1  # until ranks have told where they are
        self._locate()

    def _split(self, color: int, key: int) -> Communicator:
        return MPICommunicator(self._timeout, self._submit(lambda: self._group.Split(color, key)).wait())

    def duplicate(self) -> MPI.Comm:
        """An MPI communicator of the same ranks, for messages apart from those of this one. Collective."""
        return self._submit(self._group.Dup).wait()

    def abort(self, reason: str) -> NoReturn:
        say(reason)
        # That the only rank left aborts is no failure to an mpirun of Open MPI 5.0.11 that tolerates deaths
        if not CAN_SHRINK or MPI.COMM_WORLD.Get_failed().size < MPI.COMM_WORLD.size - 1:
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # MPI_Abort may return before the launcher's signal arrives

    def _close(self) -> None:
        if CAN_SHRINK:
            self._leave_together()
            return
        self._submit(lambda: None).wait()
        self._thread.shutdown()
        self._group.Free()

    def _leave_together(self) -> None:
        """Whoever leaves is dead for those that stay: all agree before the first one does. A rank that has died since
        the last operation keeps nobody.
        """
        with suppress(MPI.Exception):
            result_within(self._thread.submit(self._group.Agree, 1), self._timeout, self.rank, "the other ranks")
        self._thread.shutdown()

    def _revoke(self) -> None:
        self._is_revoked = True
        with suppress(MPI.Exception):
            self._group.Revoke()

    def _regroup(self) -> None:
        # Queued behind what this thread still has to do: all of it fails, as the group is revoked
        future = self._thread.submit(self._group.Shrink)
        what = "the other ranks to leave out one that has died"
        try:
            shrunk = result_within(future, self._timeout, self.rank, what)
        except MPI.Exception as error:
            raise DeadRankError(f"rank {self.rank} waits for {what}: {_first_line(error)}") from error
        self._is_revoked = False
        if shrunk.Get_size() == self.size:
            raise LostRankError(f"rank {self.rank} has lost contact with another rank, but all ranks live")
        self._group = shrunk
        self.rank, self.size = shrunk.Get_rank(), shrunk.Get_size()

    def _abandon(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool:
        return dtype in _REDUCIBLE

    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]:
        parts = flat.tensor_split(self.size)

        def run() -> None:
            if self.node_count > 1 and flat.nbytes >= _LONG:
                self._reduce_own(parts[self.rank], parts, op)
                self._gather(parts[self.rank], parts)
                return
            for piece in _pieces(flat):
                self._group.Allreduce(MPI.IN_PLACE, as_array(piece), _OPS[op])

        return self._submit(run)

    def _reduce_scatter(self, part: Tensor, values: Tensor, op: ReduceOp) -> Work[None]:
        parts = values.split(len(part))
        return self._submit(lambda: self._reduce_own(part, parts, op))

    def _reduce_own(self, part: Tensor, parts: Sequence[Tensor], op: ReduceOp) -> None:
        """Fills `part` by the reduction of what all ranks have in the place of this one among `parts`.

        By messages between all pairs: `Reduce_scatter` of Open MPI 5.0.11 takes several times as long
        (benchmarks/LOG.md).
        """
        copy_back(parts[self.rank], part)
        scratch = [torch.empty_like(part) for _ in range(min(2, self.size - 1))]
        own, rounds = as_array(part), deque[list[MPI.Request]]()
        for distance in range(1, self.size + 1):
            if distance < self.size:
                sent = parts[(self.rank + distance) % self.size]
                rounds.append(self._exchange(sent, distance, scratch[distance % len(scratch)]))
            if distance > 1:
                MPI.Request.Waitall(rounds.popleft())
                _REDUCE[op](own, as_array(scratch[(distance - 1) % len(scratch)]), out=own)

    def _exchange(self, sent: Tensor, distance: int, received: Tensor) -> list[MPI.Request]:
        """Starts to send to the rank `distance` after this one, and to receive from the one as far before it."""
        source, target = (self.rank - distance) % self.size, (self.rank + distance) % self.size
        cut = _messages if self.node_count > 1 else _pieces
        receives = [self._group.Irecv(as_array(piece), source, _PARTS_TAG) for piece in cut(received)]
        return receives + [self._group.Isend(as_array(piece), target, _PARTS_TAG) for piece in cut(sent)]

    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]:
        gathered = data.new_empty(sum(lengths))
        parts = gathered.split(list(lengths))
        is_long = gathered.nbytes >= (_LONG if self.node_count > 1 else LARGEST_MESSAGE)

        def run() -> Tensor:
            if is_long:
                parts[self.rank].copy_(data)
                self._gather(data, parts)
            else:
                self._group.Allgatherv(as_array(data), [as_array(gathered), list(lengths)])
            return gathered

        return self._submit(run)

    def _all_gather_into(self, values: Tensor, part: Tensor) -> Work[None]:
        parts = values.split(len(part))

        def run() -> None:
            copy_back(part, parts[self.rank])
            self._gather(part, parts)

        return self._submit(run)

    def _gather(self, part: Tensor, parts: Sequence[Tensor]) -> None:
        """Fills `parts` of the other ranks by the `part` of each.

        By messages between all pairs, which leave `part` as it is throughout: `Allgather` in place moves it to and
        fro, and others may read it meanwhile.
        """
        requests = []
        for distance in range(1, self.size):
            requests += self._exchange(part, distance, parts[(self.rank - distance) % self.size])
        MPI.Request.Waitall(requests)

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
                works.append(self._poll([self._group.Irecv(as_array(piece), source, _TAG)], f"rank {source} to send"))
            for piece in _messages(parts[target]):
                works.append(
                    self._poll([self._group.Isend(as_array(piece), target, _TAG)], f"rank {target} to receive")
                )

        def finish() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return Work(finish)

    def _broadcast(self, data: Tensor, root: int) -> Work[None]:
        def run() -> None:
            for piece in _pieces(data):
                self._group.Bcast(as_array(piece), root)

        return self._submit(run)

    def _send(self, data: Tensor, destination: int) -> Work[None]:
        with self._errors():
            requests = [self._group.Isend(as_array(piece), destination) for piece in _pieces(data)]
        return self._poll(requests, f"rank {destination} to receive")

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        with self._errors():
            requests = [self._group.Irecv(as_array(piece), source) for piece in _pieces(data)]
        return self._poll(requests, f"rank {source} to send")

    def _submit(self, collective: Callable[[], T]) -> Work[T]:
        """Queues a collective for the communication thread, or runs it here."""

        def run() -> T:
            with self._errors():
                wait_until(self._group.Ibarrier().Test, self._timeout, self.rank, "the other ranks")
                result = collective()
                if CAN_SHRINK:
                    self._raise_if_some_have_died()
                return result

        if self.is_inline:  # after the barrier, a rank that has stopped is left to the watchdog of `activity`
            return Work.done(run())
        future = self._thread.submit(run)
        # The barrier has its own deadline; this one is for the collective, where a rank has stopped after the barrier
        return Work(lambda: result_within(future, self._timeout, self.rank, "the other ranks"))

    def _raise_if_some_have_died(self) -> None:
        """Open MPI 5.0.11: an Allgatherv in which a rank dies may return without data, and without an error."""
        failed = self._group.Get_failed()
        number = failed.Get_size()
        failed.Free()
        if number or self._group.Is_revoked():
            self._revoke()
            raise self._dead_rank_error()

    def _dead_rank_error(self, detail: str = "") -> DeadRankError:
        return DeadRankError(f"rank {self.rank} on {socket.gethostname()}: another rank has died{detail}")

    def _poll(self, requests: Sequence[MPI.Request], what: str) -> Work[None]:
        # mpi4py: a request that has ended becomes MPI_REQUEST_NULL, whose Test is true again
        def finish() -> None:
            with self._errors():
                for request in requests:
                    wait_until(request.Test, self._timeout, self.rank, what)

        return Work(finish)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Says what an error of MPI means: a lost rank, ranks that disagree, no memory; one of a bug stays as it is.

        After a death this rank sends nothing more: the others, which have not noticed it yet, would take it for what
        they wait for.
        """
        if self._is_revoked:
            raise self._dead_rank_error()
        try:
            yield
        except MPI.Exception as error:
            here = f"rank {self.rank} on {socket.gethostname()}"
            kind = error.Get_error_class()
            if CAN_SHRINK:
                # Of any class: what a death makes of operations under way is not always the class that is meant for it
                self._revoke()
                raise self._dead_rank_error(f" ({_first_line(error)})") from error
            if kind in _WRONG_ARGUMENTS:
                raise
            if kind == MPI.ERR_NO_MEM:
                raise HvdlmError(
                    f"{here}: MPI has no memory left for a message ({_first_line(error)}): start fewer ranks on this "
                    "host, or lower train.micro_batch_size"
                ) from error
            if kind == MPI.ERR_TRUNCATE:
                raise HvdlmError(
                    f"{here} received a longer message than it expects ({_first_line(error)}): another rank is not at "
                    "the same place; if all ranks have the same settings, data set and hvdlm, this is a bug in hvdlm"
                ) from error
            with lost_rank_errors(self.engine, self.rank, MPI.Exception):
                raise


def _pieces(data: Tensor) -> Sequence[Tensor]:
    """`data`, (n,), in pieces of LARGEST_MESSAGE bytes, the last one shorter; views of it."""
    if data.nbytes <= LARGEST_MESSAGE:
        return [data]
    return list(data.split(LARGEST_MESSAGE // data.element_size()))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _messages(data: Tensor) -> Sequence[Tensor]:
    """`data`, (n,), in messages of `_MESSAGE` bytes, the last one shorter; views of it."""
    return data.split(_MESSAGE // data.element_size()) if len(data) else []
