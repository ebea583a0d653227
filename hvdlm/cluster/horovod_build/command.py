"""Runs the commands of install-horovod: writes their output to a log and turns a failure into one sentence."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError

# Patterns in the output of a failed command, each with a remedy; the first that matches is reported.
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

    `task` names the command in an error ("compiling Horovod"); `timeout` is in seconds.

    Raises HvdlmError if the command cannot start, exits non-zero, or takes longer than `timeout`, after which it and
    its children are ended. The error has a remedy if one is known, otherwise a line of the output.
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
    """The exit status, or why there is none, as a phrase."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,  # so that its children can be ended with it
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
    """Ends the process group, with SIGTERM first so that a launcher can end its ranks."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(status: int | str, output: str) -> str:
    """Why a command failed, with a remedy if one is known."""
    for symptom, remedy in _REMEDIES:
        if re.search(symptom, output):
            return remedy
    if isinstance(status, str):
        return status
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return f"exit status {status} without output"
    # Compilers print the cause first and its consequences later. Other programs print the cause last. A file may have
    # error in its name.
    errors = [number for number, line in enumerate(lines) if re.search(r"\berror\b(?!\.\w)", line, re.IGNORECASE)]
    cause = " ".join(lines[errors[0] : errors[0] + 2]) if errors else lines[-1]
    return f"exit status {status}, {cause[:200]}"
