"""Runs the probe (host_probe.py) on a host over ssh, without prompts, with a timeout, and leaves no process behind."""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

from hvdlm.cluster.doctor.host_probe import LINE_PREFIX, SESSION_PATH
from hvdlm.errors import HvdlmError

# Search paths of programs, libraries and Python modules, which are passed on to every host.
SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")

# Seconds that a finished probe's end takes to arrive over ssh.
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class ProbeResult:
    """How a probe ended; `status` is None if it did not end within the timeout."""

    status: int | None
    output: str
    errors: str


async def run_probe(host: str | None, timeout: float) -> ProbeResult:
    """Runs the probe's `report` on a host, or on this machine if `host` is None; `timeout` in seconds."""
    process = await start_probe(host, "report", timeout, asyncio.subprocess.PIPE)
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout + _GRACE_SECONDS)
    except asyncio.TimeoutError:
        return ProbeResult(None, "", "")
    finally:
        await end_probe(process)
    return ProbeResult(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


async def start_probe(
    host: str | None, task: str, timeout: float, errors: int = asyncio.subprocess.DEVNULL
) -> asyncio.subprocess.Process:
    """Starts the probe on a host, with pipes to it; the caller must call `end_probe`. `task`: the probe's arguments.

    Half of `timeout` is for ssh to connect, half for the probe. Killing ssh does not end the remote process, so the
    command `timeout` on the host ends it.
    """
    seconds = max(1, math.ceil(timeout / 2))
    command = ["sh", "-c", _script(task, seconds)] if host is None else _ssh(host, _script(task, seconds), seconds)
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},  # probe_failures.py matches the messages of ssh
            start_new_session=True,
        )
    except FileNotFoundError:
        raise HvdlmError(
            f"{command[0]} is not installed here (Debian, Ubuntu: apt-get install openssh-client)"
        ) from None


async def end_probe(process: asyncio.subprocess.Process) -> None:
    """Closes a probe's standard input, at which it ends, and kills the local processes that are left."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _GRACE_SECONDS)
    with suppress(ProcessLookupError):  # ssh may have started others (ProxyCommand)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def read_line(process: asyncio.subprocess.Process) -> str:
    """The next line that a probe has written; raises EOFError if it has ended."""
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode(errors="replace"):
        if line.startswith(LINE_PREFIX):
            return line.removeprefix(LINE_PREFIX)
    raise EOFError


def _script(task: str, seconds: int) -> str:
    """A line for sh that runs the probe with this Python and these search paths, and passes on the session's PATH."""
    paths = [f"{name}={shlex.quote(os.environ[name])}" for name in SEARCH_PATHS if name in os.environ]
    python = f"{shlex.quote(sys.executable)} -m hvdlm.cluster.doctor.host_probe {task}"
    limit = f"timeout --kill-after=1 {seconds}"
    return f'exec {limit} env {SESSION_PATH}="$PATH" {" ".join(paths)} {python}'


def _ssh(host: str, script: str, seconds: int) -> list[str]:
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": seconds,
        "ControlMaster": "no",  # a master connection would stay behind and keep the pipes open
        "LogLevel": "ERROR",  # errors but no banners, whatever the user's configuration
    }
    arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    # The login shell may not be a POSIX shell, so it only starts sh.
    return ["ssh", *arguments, "--", host, f"exec sh -c {shlex.quote(script)}"]
