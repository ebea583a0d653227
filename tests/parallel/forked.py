"""`hvdlm ...` in a process of its own that need not import torch first, which takes longer than most commands do.

The process is forked from one that has imported what hvdlm's commands import, and has done nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

DEADLINE = 120.0  # seconds

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "hvdlm.cli", "hvdlm.training.run", "hvdlm.data.prepare"])


def hvdlm(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs one command in `cwd`, with more environment variables, and returns its exit status and what it printed."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run, args=(words, cwd, {**os.environ, **variables}, files))
        process.start()
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["hvdlm", *words], DEADLINE)
        stdout, stderr = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
        return subprocess.CompletedProcess(["hvdlm", *words], process.exitcode, stdout, stderr)


def _run(words: Sequence[str], cwd: Path, environment: Mapping[str, str], files: Sequence[Path]) -> None:
    """In the forked process: what `python -m hvdlm` does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    from hvdlm.cli import main

    sys.argv = ["hvdlm", *words]
    sys.exit(main(words))
