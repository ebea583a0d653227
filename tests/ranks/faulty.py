"""Checks with faults, by which the pool itself is tested."""

from __future__ import annotations

import os
import time

from hvdlm.comm.communicator import Communicator


def check_nothing(comm: Communicator) -> int:
    print(f"rank {comm.rank} was here", flush=True)
    return comm.rank


def check_that_fails_on_one_rank(comm: Communicator) -> None:
    if comm.rank == 1:
        raise ZeroDivisionError("on one rank only")


def check_that_fails_while_others_wait(comm: Communicator) -> None:
    check_that_fails_on_one_rank(comm)
    comm.barrier()


def check_that_hangs(comm: Communicator) -> None:
    if comm.rank == 1:
        time.sleep(1000)


def check_whose_rank_dies(comm: Communicator) -> None:
    if comm.rank == 1:
        print("the last words of rank 1", flush=True)
        os._exit(7)
    comm.barrier()


def check_that_leaves_traces(comm: Communicator) -> None:
    os.environ["HVDLM_TRACE"] = "1"
    os.chdir("/")
