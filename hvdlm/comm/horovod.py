"""Engine `horovod`: Horovod's collectives, for ranks started by horovodrun and for NCCL builds on GPUs.

Horovod has no messages between two ranks, and groups of ranks only where each cycle of its own exchanges one more
message for them. So beside it stands a communicator of the same ranks that has both: engine mpi where Horovod runs over
MPI, which has made MPI ranks of them, and tcp.py where it runs over Gloo. It also carries what Horovod would let wait
for its next cycle: whatever is only moved, and short sums, of tensors on CPUs. Horovod does all on GPUs that it can
reach, and longer sums on CPUs where `comm.algorithm` finds that it costs less than the ring.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import horovod.torch as hvd
import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import ENGINE_TIMEOUT, end_process, lost_rank_errors, wait_until
from hvdlm.comm.groups import group_by_color, group_ranks
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.startup import STARTUP_TIMEOUT, start_mpi, startup_deadline
from hvdlm.comm.tcp import TcpCommunicator
from hvdlm.comm.work import Work
from hvdlm.errors import HvdlmError

_OPS = {ReduceOp.SUM: hvd.Sum, ReduceOp.MAX: hvd.Max}

_REDUCIBLE = frozenset({torch.float32, torch.int32, torch.int64})

# Bytes up to which a sum of tensors on CPUs does not wait for Horovod's cycle.
_SHORT = 8 * 1024

# The name of the communicator with which Horovod ends.
_WHOLE_JOB = "hvdlm"


class _Names:
    """Names for operations in progress: the lowest free number, so that names repeat every step.

    Horovod negotiates each tensor by name among the ranks and caches the names that it has seen; a new name each time
    would be negotiated in full each time. A number is free again once its operation has been waited for, which
    happens in the same order on every rank, so all ranks choose the same names.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._in_use: dict[str, set[int]] = defaultdict(set)

    def acquire(self, kind: str) -> tuple[str, Callable[[], None]]:
        """A name, and the function that releases it."""
        in_use = self._in_use[kind]
        number = next(number for number in range(len(in_use) + 1) if number not in in_use)
        in_use.add(number)
        return f"{self.prefix}.{kind}.{number}", lambda: in_use.discard(number)


class HorovodCommunicator(Communicator):
    """Ranks of Horovod: all of them, or those of a process set."""

    engine = "horovod"

    def __init__(
        self, process_set: Any, members: Sequence[int], timeout: float, messages: Communicator | None, name: str
    ) -> None:
        """`members`: the ranks of `process_set` as Horovod numbers them, in our order. `messages`: a communicator of
        the same ranks in the same order, which is closed with this one. `name`: of this communicator, the same on its
        ranks and no other's of theirs. `start` makes the first one."""
        super().__init__()
        self._timeout = timeout
        self._set = process_set
        self._members = list(members)
        self._group_ranks = group_ranks(members)
        self._messages = messages
        self._names = _Names(name)
        by_messages = {"send", "split"} if messages is not None else set()
        self.capabilities = frozenset({"float16"} | by_messages | ({"cuda"} if hvd.nccl_built() else set()))
        self.rank, self.size = self._members.index(hvd.rank()), len(self._members)
        self._locate()

    @classmethod
    def start(cls, rank: int, timeout: float, engine_sums: bool = True) -> HorovodCommunicator:
        """Initialises Horovod, and what carries messages; `timeout`: seconds that `rank` waits for another;
        `engine_sums`: whether gradients may be left to Horovod's all-reduce."""
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(ENGINE_TIMEOUT))
        # Buckets are large already; which of them Horovod fuses would depend on timing, and with it the order of sums
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        # Only long sums on CPUs are left to it, and its thread, which exchanges a message in every cycle, takes 4 to 6%
        # of a core from the backward pass at its default of 1 ms over Gloo, 1% at 5. Over MPI ranks also wait for one
        # another in every cycle: with two ranks on two cores 7% of a step at 5 ms, 0 to 5% at 100 (benchmarks/LOG.md).
        if not hvd.nccl_built():
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "5" if engine_sums else "100")
        # Over Gloo it waits for ranks that are still being started; over MPI they have all come by now.
        over_gloo = "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ
        # First, so that the end of Horovod is not that of MPI
        messages: Communicator | None = None if over_gloo else start_mpi(rank, timeout)
        with startup_deadline(rank, timeout if over_gloo else min(timeout, STARTUP_TIMEOUT)):
            hvd.init()
        everyone = hvd.global_process_set, range(hvd.size()), timeout
        if messages is None:
            messages = TcpCommunicator(cls(*everyone, None, "hvdlm.start"), 0, rank, timeout)
        elif (messages.rank, messages.size) != (hvd.rank(), hvd.size()):
            raise HvdlmError(
                f"Horovod sees {hvd.size()} ranks and takes itself for rank {hvd.rank()}, mpi4py sees {messages.size} "
                f"and takes itself for rank {messages.rank}: start the job with the launcher of the MPI that Horovod "
                "is built for, and install mpi4py for that one"
            )
        return cls(*everyone, messages, _WHOLE_JOB)

    def _split(self, color: int, key: int) -> Communicator:
        assert self._messages is not None
        messages = self._messages.split(color, key)
        groups = group_by_color(self.all_gather_object((color, key)))
        members = [self._members[rank] for rank in groups[color]]
        name = f"{self._names.prefix}.{len(self._groups)}"
        if len(groups) == 1:
            return HorovodCommunicator(self._set, members, self._timeout, messages, name)
        if self._set is not hvd.global_process_set or os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") != "1":
            return messages
        # Adding a process set is collective over all ranks, so each rank adds those of the other colors too.
        process_sets = {
            each: _process_set(tuple(sorted(self._members[rank] for rank in ranks))) for each, ranks in groups.items()
        }
        return HorovodCommunicator(process_sets[color], members, self._timeout, messages, name)

    def abort(self, reason: str) -> NoReturn:
        end_process(reason)  # the launcher ends the other ranks when one exits non-zero

    def _close(self) -> None:
        assert self._messages is not None
        self._messages.close()
        # Process sets end with the job: removing one is collective over all ranks, members or not
        if self._names.prefix == _WHOLE_JOB:
            hvd.shutdown()

    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool:
        # Of half-precision numbers Horovod knows only the sum, and bfloat16 not at all (horovod issue 4047).
        return dtype in _REDUCIBLE or (dtype is torch.float16 and op is ReduceOp.SUM)

    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]:
        if flat.nbytes <= _SHORT and (messages := self._beside(flat)):
            return messages.all_reduce_async_(flat, op).then(lambda _: None)
        return self._start(_kind("all_reduce", flat), hvd.allreduce_async_, flat, op=_OPS[op]).then(lambda _: None)

    def _reduce_scatter(self, part: Tensor, values: Tensor, op: ReduceOp) -> Work[None]:
        def keep(reduced: Tensor) -> None:
            part.copy_(_owned(reduced))

        # Horovod scatters only sums, in its own order of ranks
        if op is ReduceOp.SUM and self._group_ranks == sorted(self._group_ranks):
            return self._start(_kind("reduce_scatter", values), hvd.reducescatter_async, values, op=hvd.Sum).then(keep)
        reduced = values.clone()
        return self._all_reduce(reduced, op).then(lambda _: keep(reduced.split(len(part))[self.rank]))

    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]:
        if messages := self._beside(data):
            return messages.all_gather_v_async(data, lengths).then(torch.cat)
        lengths_by_group_rank = [lengths[self._group_ranks.index(each)] for each in range(self.size)]

        def in_rank_order(gathered: Tensor) -> Tensor:
            pieces = torch.split(_owned(gathered), lengths_by_group_rank)
            return torch.cat([pieces[each] for each in self._group_ranks])

        return self._start(f"all_gather.{sum(lengths)}", hvd.allgather_async, data).then(in_rank_order)

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        if messages := self._beside(parts[0]):
            return messages.all_to_all_async(parts, lengths)
        by_group_rank = [self._group_ranks.index(each) for each in range(self.size)]
        sent = torch.cat([parts[each] for each in by_group_rank])
        splits = torch.tensor([len(parts[each]) for each in by_group_rank], dtype=torch.int32)

        def in_rank_order(result: tuple[Tensor, Tensor]) -> list[Tensor]:
            arrived = _owned(result[0]).split([lengths[each] for each in by_group_rank])
            return [arrived[each] for each in self._group_ranks]

        return self._start("all_to_all", hvd.alltoall_async, sent, splits).then(in_rank_order)

    def _broadcast(self, data: Tensor, root: int) -> Work[None]:
        if messages := self._beside(data):
            return messages.broadcast_async_(data, root).then(lambda _: None)
        return self._start(_kind("broadcast", data), hvd.broadcast_async_, data, self._members[root]).then(
            lambda _: None
        )

    def _send(self, data: Tensor, destination: int) -> Work[None]:
        assert self._messages is not None
        return self._messages.send_async(data, destination)

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        assert self._messages is not None
        return self._messages.receive_async_(data, source).then(lambda _: None)

    def _beside(self, tensor: Tensor) -> Communicator | None:
        """What carries `tensor` without waiting for Horovod's cycle; None if it is on a GPU, and at the start."""
        return None if tensor.is_cuda else self._messages

    def _start(self, kind: str, operation: Callable[..., int], *arguments: Any, **options: Any) -> Work[Any]:
        name, release = self._names.acquire(kind)
        with lost_rank_errors(self.engine, self.rank, hvd.HorovodInternalError):
            handle = operation(*arguments, **options, name=name, process_set=self._set)

        def finish() -> Any:
            wait_until(lambda: hvd.poll(handle), self._timeout, self.rank, "the other ranks")
            with lost_rank_errors(self.engine, self.rank, hvd.HorovodInternalError):
                result = hvd.synchronize(handle)
            release()
            return result

        return Work(finish)


def _owned(output: Tensor) -> Tensor:
    """An output that Horovod has allocated, on its thread and so in the memory of the default stream: it is kept from
    other uses until the stream that reads it here has done so.
    """
    if output.is_cuda:
        output.record_stream(torch.cuda.current_stream(output.device))
    return output


def _kind(kind: str, flat: Tensor) -> str:
    """The kind of an operation: Horovod caches by name, dtype and shape, so unlike tensors need different names."""
    return f"{kind}.{flat.dtype}.{flat.numel()}"


@functools.cache
def _process_set(ranks: tuple[int, ...]) -> Any:
    """Horovod's process set of these ranks; it refuses to add the same one twice."""
    return hvd.global_process_set if len(ranks) == hvd.size() else hvd.add_process_set(list(ranks))
