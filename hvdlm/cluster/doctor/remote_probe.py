"""Programs on the hosts of a list: over ssh, without a question, within a deadline, and with nothing left behind."""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

from hvdlm.cluster.doctor.host_probe import MARK, SESSION_PATH
from hvdlm.errors import HvdlmError

# Where programs, libraries and modules are found: launchers take these along to every host.
SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")

# Seconds for the news of an end to arrive.
_GRACE = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `status` is None where it was ended at the deadline."""

    status: int | None
    output: str
    errors: str


async def run_probe(host: str | None, timeout: float) -> Outcome:
    """The probe's report from a host, or what went wrong; `host` None: this machine; `timeout` in seconds."""
    process = await start_probe(host, "report", timeout, asyncio.subprocess.PIPE)
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout + _GRACE)
    except asyncio.TimeoutError:
        return Outcome(None, "", "")
    finally:
        await end_probe(process)
    return Outcome(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


async def start_probe(
    host: str | None, task: str, timeout: float, errors: int = asyncio.subprocess.DEVNULL
) -> asyncio.subprocess.Process:
    """Starts the probe at `task` on a host, with pipes to it; `end_probe` must follow.

    Half of `timeout` is for ssh to get there, half for the probe: killing ssh does not end what runs at its other end,
    so that over there the command `timeout` must.
    """
    seconds = max(1, math.ceil(timeout / 2))
    command = ["sh", "-c", _script(task, seconds)] if host is None else _ssh(host, _script(task, seconds), seconds)
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},  # what ssh says is read in failures.py
            start_new_session=True,
        )
    except FileNotFoundError:
        raise HvdlmError(
            f"{command[0]} is not installed here (Debian, Ubuntu: apt-get install openssh-client)"
        ) from None


async def end_probe(process: asyncio.subprocess.Process) -> None:
    """Lets a probe end, which it does with its input, and kills what then is left on this side."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _GRACE)
    with suppress(ProcessLookupError):  # ssh may have helpers (ProxyCommand)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def next_word(process: asyncio.subprocess.Process) -> str:
    """The next line of a probe; raises EOFError if it has ended."""
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode(errors="replace"):
        if line.startswith(MARK):
            return line.removeprefix(MARK)
    raise EOFError


def _script(task: str, seconds: int) -> str:
    """For sh: runs the probe by this Python, with our search paths, and tells it what its session's PATH was."""
    paths = [f"{name}={shlex.quote(os.environ[name])}" for name in SEARCH_PATHS if name in os.environ]
    python = f"{shlex.quote(sys.executable)} -m hvdlm.cluster.doctor.host_probe {task}"
    limit = f"timeout --kill-after=1 {seconds}"
    return f'exec {limit} env {SESSION_PATH}="$PATH" {" ".join(paths)} {python}'


def _ssh(host: str, script: str, seconds: int) -> list[str]:
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": seconds,
        "ControlMaster": "no",  # would stay behind, holding our pipes
        "LogLevel": "ERROR",  # whatever the user's configuration says: no banners, but reasons
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    # The login shell may be any: a POSIX one takes it from there.
    return ["ssh", *words, "--", host, f"exec sh -c {shlex.quote(script)}"]
