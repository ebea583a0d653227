"""`hvdlm train` or `serve` whose servers log what they do: `logged_servers.py DIRECTORY FAULTS ARGUMENTS...`.

Each server appends records to DIRECTORY/RANK: tuples, as pickles. FAULTS: "WORKER:TASKS,...", or "-"; a worker is
killed while it pushes the second bucket of the task after so many. One with "rests" in place of a number is slow. A
process of its own is worker 0.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hvdlm.cli import main
from hvdlm.comm.mailbox import Letter
from hvdlm.strategies.server.exchange import ServerExchange
from hvdlm.strategies.server.following import FollowingServer
from hvdlm.strategies.server.group import Kind
from hvdlm.strategies.server.owned import OwnedParameters

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


def log_to(path: Path) -> None:
    """Of what comes to this server: what is loaded, what workers push; and of what it sends: versions of parameters."""

    def write(*record: Any) -> None:
        with path.open("ab") as file:
            pickle.dump(record, file)

    load, add, step, serve = (
        OwnedParameters.load,
        OwnedParameters.add,
        OwnedParameters.step,
        OwnedParameters.weights,
    )
    act = FollowingServer.act

    def logged_load(own: OwnedParameters, bucket: int, is_state: bool, message: Tensor) -> None:
        write("load", bucket, is_state, message.clone())
        load(own, bucket, is_state, message)

    def logged_add(own: OwnedParameters, bucket: int, message: Tensor, step: int) -> None:
        write("add", bucket, message.clone())
        add(own, bucket, message, step)

    def logged_step(own: OwnedParameters, factor: float, rate: float) -> None:
        write("step", factor, rate)
        step(own, factor, rate)

    def logged_weights(own: OwnedParameters, bucket: int, ahead: float = 0.0) -> Tensor:
        sent = serve(own, bucket, ahead)
        write("pull", bucket, ahead, sent.clone())
        return sent

    def logged_act(own: FollowingServer, order: Letter) -> None:
        if order.kind in (Kind.ADD, Kind.DROP):
            _, task, worker, version = order.header
            write("task", Kind(order.kind).name, task, worker, own.version, version)
        elif order.kind == Kind.SERVE:
            write("serve", *order.header[1:3])
        act(own, order)

    OwnedParameters.load, OwnedParameters.add = logged_load, logged_add  # type: ignore[method-assign]
    OwnedParameters.step, OwnedParameters.weights = logged_step, logged_weights  # type: ignore[method-assign]
    FollowingServer.act = logged_act  # type: ignore[method-assign]


def die_after(tasks: int) -> None:
    push, pushes = ServerExchange.push, 0

    def mortal_push(own: ServerExchange, bucket: int, messages: Sequence[Tensor], step: int) -> None:
        nonlocal pushes
        if bucket == 1 and (pushes := pushes + 1) > tasks:
            os.kill(os.getpid(), signal.SIGKILL)
        push(own, bucket, messages, step)

    ServerExchange.push = mortal_push  # type: ignore[method-assign]


def rest() -> None:
    push = ServerExchange.push

    def slow_push(own: ServerExchange, bucket: int, messages: Sequence[Tensor], step: int) -> None:
        time.sleep(0.1)
        push(own, bucket, messages, step)

    ServerExchange.push = slow_push  # type: ignore[method-assign]


if __name__ == "__main__":
    directory, faults, *arguments = sys.argv[1:]
    log_to(Path(directory) / str(RANK))
    for worker, fault in (each.split(":") for each in faults.split(",") if each != "-"):
        if int(worker) == RANK:
            rest() if fault == "rests" else die_after(int(fault))
    sys.exit(main(arguments))
