"""What is engine mpi's own: messages that are longer than a call of MPI may be, and what its errors are called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import communicator_body
import numpy as np
import pytest
import torch
from checks import check
from mpi4py import MPI

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.mpi import MPICommunicator
from hvdlm.errors import HvdlmError

CALLS = {"Allreduce", "Allgatherv", "Bcast", "Isend", "Irecv"}

COLLECTIVES = (
    communicator_body.check_all_reduce,
    communicator_body.check_reduce_scatter,
    communicator_body.check_equal_parts,
    communicator_body.check_all_gather,
    communicator_body.check_broadcast,
    communicator_body.check_objects,
)


class Recorder:
    """MPI's communicator, with the bytes of the longest buffer of each call."""

    def __init__(self, group: MPI.Comm) -> None:
        self.group, self.longest = group, dict.fromkeys(CALLS, 0)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.group, name)
        if name not in CALLS:
            return function

        def record(*arguments: Any) -> Any:
            flat = [part for each in arguments for part in (each if isinstance(each, list) else [each])]
            buffers = [each.nbytes for each in flat if isinstance(each, np.ndarray)]
            self.longest[name] = max([self.longest[name], *buffers])
            return function(*arguments)

        return record


@check(sizes=[2, 3])
def check_long_messages_go_in_pieces(comm: Communicator) -> None:
    """With calls of at most 1,000 bytes every operation gives what it gives with 2**30."""
    assert isinstance(comm, MPICommunicator)
    comm.barrier()
    recorder = Recorder(comm._group)
    with patch("hvdlm.comm.mpi.LARGEST_MESSAGE", 1000), patch.object(comm, "_group", recorder):
        for body in (*COLLECTIVES, communicator_body.check_messages):
            body(comm)
        # of one piece and of many on different ranks
        lengths = [7, 5000, 0][: comm.size]
        own = torch.arange(lengths[comm.rank]) + comm.rank
        for rank, part in enumerate(comm.all_gather_v(own, lengths)):
            assert part.tolist() == [number + rank for number in range(lengths[rank])]
        # 8,000 bytes, of which a rank gets more than a piece
        part = comm.reduce_scatter(torch.arange(1000))
        small, larger = divmod(1000, comm.size)
        start = comm.rank * small + min(comm.rank, larger)
        assert part.tolist() == [comm.size * number for number in range(start, start + len(part))]
        assert len(part) in (small, small + 1)
    assert max(recorder.longest.values()) <= 1000, recorder.longest
    assert all(recorder.longest.values()), recorder.longest


@check(sizes=[2, 3])
def check_long_tensors_between_hosts_go_in_short_messages(comm: Communicator) -> None:
    """As if ranks were on several hosts, with messages of at most 1,024 bytes from 2,048 bytes on."""
    assert isinstance(comm, MPICommunicator)
    comm.barrier()
    recorder = Recorder(comm._group)
    with (
        patch("hvdlm.comm.mpi._MESSAGE", 1024),
        patch("hvdlm.comm.mpi._LONG", 2048),
        patch.object(comm, "node_count", 2),
        patch.object(comm, "_group", recorder),
    ):
        for body in COLLECTIVES:
            body(comm)
        own = torch.arange(900)[: 400 * comm.rank]  # none on the first rank
        for rank, part in enumerate(comm.all_gather_v(own)):
            assert torch.equal(part, torch.arange(400 * rank))
    longest = recorder.longest
    assert longest["Isend"] == longest["Irecv"] == 1024, longest
    assert 0 < longest["Allreduce"] < 2048 and 0 < longest["Allgatherv"] < 2048, longest


def raised_by(comm: MPICommunicator, action: Callable[[], object]) -> Exception | None:
    try:
        comm._submit(action).wait()
    except Exception as error:
        return error
    return None


@check(sizes=[2, 3])
def check_inline_collectives(comm: Communicator) -> None:
    """They run on the thread that calls them, give what queued ones give, and do not wait for ever."""
    group = comm.split(0, comm.rank)
    assert isinstance(group, MPICommunicator)
    assert group._submit(threading.get_ident).wait() != threading.get_ident()
    group.is_inline = True
    assert group._submit(threading.get_ident).wait() == threading.get_ident()
    for body in COLLECTIVES:
        body(group)
    group._timeout = 0.2
    if comm.rank == 0:
        with pytest.raises(LostRankError, match=r"waited 0\.2 s"):
            group.barrier()
    comm.barrier()
    group._timeout = 60.0
    if comm.rank != 0:  # this completes the message that rank 0 has given up
        group._group.Ibarrier()
    comm.barrier()


@check(sizes=[1, 2])
def check_an_error_of_mpi_is_called_what_it_is(comm: Communicator) -> None:
    assert isinstance(comm, MPICommunicator)
    wrong_root = raised_by(comm, lambda: comm._group.Bcast(np.zeros(1), comm.size))
    assert isinstance(wrong_root, MPI.Exception), repr(wrong_root)

    def fail(kind: int) -> None:
        raise MPI.Exception(kind)

    for kind in (MPI.ERR_ARG, MPI.ERR_COUNT, MPI.ERR_TYPE):
        assert isinstance(raised_by(comm, lambda kind=kind: fail(kind)), MPI.Exception)  # type: ignore[misc]
    no_memory = raised_by(comm, lambda: fail(MPI.ERR_NO_MEM))
    assert isinstance(no_memory, HvdlmError) and not isinstance(no_memory, LostRankError)
    assert "MPI has no memory left for a message" in str(no_memory)
    for kind in (MPI.ERR_OTHER, MPI.ERR_INTERN, MPI.ERR_UNKNOWN):
        assert isinstance(raised_by(comm, lambda kind=kind: fail(kind)), LostRankError)  # type: ignore[misc]


@check(sizes=[2])
def check_a_message_that_is_too_long_is_no_lost_rank(comm: Communicator) -> None:
    if comm.rank == 0:
        comm.send(torch.zeros(100), 1)
    else:
        try:
            comm.receive_(torch.zeros(10), 0)
        except HvdlmError as error:
            assert not isinstance(error, LostRankError)
            assert "rank 1 on " in str(error) and "received a longer message than it expects" in str(error)
        else:
            raise AssertionError("the message was cut")
