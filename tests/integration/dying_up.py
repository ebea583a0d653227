"""`hvdlm` with words of its own, killed at a stage of `hvdlm fabric up`: `dying_up.py STAGE WORDS...`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from hvdlm.cli import main
from hvdlm.cluster.fabric import config_files, fabric
from hvdlm.cluster.fabric.fabric import Fabric


def dies_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but that this process dies instead of calling it for the `call`th time."""
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return counted


def set_up(stage: str) -> None:
    if stage == "the state directory is made":
        fabric.write_config_files = dies_at(1, fabric.write_config_files)
    elif stage == "the host list is written":
        config_files._make_key = dies_at(1, config_files._make_key)
    elif stage == "the switch is started":
        Fabric._start_host = dies_at(1, Fabric._start_host)  # type: ignore[method-assign]
    elif stage == "a host is started":
        Fabric._start_host = dies_at(2, Fabric._start_host)  # type: ignore[method-assign]
    elif stage == "sshd runs":
        fabric._await_ready = dies_at(3, fabric._await_ready)  # of the switch, of h1, of h2
    else:
        raise ValueError(stage)


if __name__ == "__main__":
    set_up(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
