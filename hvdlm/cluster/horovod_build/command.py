"""Programs that install-horovod runs: their output goes to a log, their failure becomes one sentence."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError

# What logs say, and what the user can do about it; the first that matches is told.
_REMEDIES = [
    (
        r"No space left on device",
        "the disk is full: free some space, or set HVDLM_CACHE to a directory on a larger disk",
    ),
    (
        r"externally-managed-environment",
        "this Python belongs to the system: make a virtual environment (python3 -m venv .venv) and install hvdlm there",
    ),
    (r"No module named pip\b", "this Python has no pip: install it (python3 -m ensurepip)"),
    (
        r"Python\.h: No such file",
        "Python's headers are missing: install them (Debian, Ubuntu: apt install python3-dev)",
    ),
    (
        r"Killed signal|fatal error: Killed|out of memory",
        "the compiler ran out of memory: set CMAKE_BUILD_PARALLEL_LEVEL=1 to compile one file at a time",
    ),
    (
        r"No matching distribution|name resolution|Name or service not known|Network is unreachable|"
        r"Connection refused|Connection timed out|ConnectTimeout|ProxyError|SSLError",
        "pip cannot reach a package index: check the network, the proxy and pip's configuration (pip config list)",
    ),
    (
        r"is not able to compile a simple test program|No CMAKE_C(XX)?_COMPILER could be found",
        "the compiler cannot compile the simplest program: repair it, or set CXX and CC to one that can",
    ),
]


def run_logged(
    task: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    directory: Path | None = None,
    timeout: float | None = None,
) -> str:
    """Runs a command, appends it and its output to `log`, and returns that output.

    `task` says in an error what failed ("compiling Horovod"); `timeout` is in seconds.

    Raises HvdlmError, with the reason and the remedy where they are known, the last line of output otherwise,
    when the command cannot start, exits non-zero, or outlasts `timeout` (all its children are ended).
    """
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        start = file.tell()
        status = _status(command, file.fileno(), environment, directory, timeout)
        file.seek(start)
        output = file.read()
    if status == 0:
        return output
    raise HvdlmError(f"{task} failed: {_reason(status, output)} (log: {log})")


def _status(
    command: Sequence[str], output: int, environment: Mapping[str, str], directory: Path | None, timeout: float | None
) -> int | str:
    """The exit status, or in words why there is none."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,  # compilers and ranks can then be ended together
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout:g} seconds"
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks first, so that a launcher can end its ranks."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(status: int | str, output: str) -> str:
    for symptom, remedy in _REMEDIES:
        if re.search(symptom, output):
            return remedy
    if isinstance(status, str):
        return status
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return f"exit status {status} without a word"
    # compilers name the cause first; what follows is its consequence. Others end with the cause.
    errors = [number for number, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)]
    told = " ".join(lines[errors[0] : errors[0] + 2]) if errors else lines[-1]
    return f"exit status {status}, {told[:200]}"
