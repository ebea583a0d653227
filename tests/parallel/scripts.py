"""Benchmarks for tests: as a process of their own, or, where that is not what a test is about, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import sys
from pathlib import Path
from unittest.mock import patch

from launcher import Result, environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script_command(script: str, *words: str) -> list[str]:
    """What starts a script of benchmarks/ as a process."""
    return [sys.executable, str(BENCHMARKS / script), *words]


def run_here(script: str, *words: str) -> Result:
    """Runs a script of benchmarks/ in this process, as `python benchmarks/SCRIPT WORDS...` would."""
    output = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    status = 0
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, handler)
        stack.enter_context(patch.dict(os.environ, environment()))
        stack.enter_context(patch.object(sys, "argv", [script, *words]))
        stack.enter_context(patch.object(sys, "path", [str(BENCHMARKS), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):  # as the interpreter does
                print(end.code)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(status, output.getvalue())
