"""For all test folders: the launcher module, a small data set made once, what markers mean, and no skips in CI."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hvdlm.cluster.fabric.programs import require
from hvdlm.errors import HvdlmError

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("parallel", "ranks")]

# Shells start what runs in the background with interrupts ignored, and nohup with hang-ups; children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Jobs have temporary directories of their own; what torch.compile makes for one is there for the next
_COMPILED = Path(tempfile.gettempdir()) / f"hvdlm-tests-{os.getuid()}-inductor"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_COMPILED))


@pytest.fixture(scope="session")
def small_texts() -> list[str]:
    """Some packages of the standard library, as globs."""
    library = Path(sysconfig.get_path("stdlib"))
    return [str(library / package / "*.py") for package in ("asyncio", "email", "json", "logging", "unittest")]


@pytest.fixture(scope="session")
def small_data(small_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level data set of those, 6 shards."""
    directory = tmp_path_factory.mktemp("data") / "small"
    command = [sys.executable, "-m", "hvdlm", "prepare", "--input", *small_texts, "--output", str(directory)]
    subprocess.run([*command, "--shards", "6", "--validation", "0.1", "--skip-bad"], check=True)
    return directory


def _no_sshfs() -> str | None:
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse here"
    return _no_fabric(slurm=False) or (None if shutil.which("sshfs") else "sshfs is not installed")


def _no_fabric(slurm: bool) -> str | None:
    try:
        require(slurm)
    except HvdlmError as error:
        return str(error)
    return None


# Why tests with a marker cannot run here, or None where they can.
_OBSTACLES: dict[str, Callable[[], str | None]] = {
    "needs_root": functools.cache(lambda: _no_fabric(slurm=False)),
    "needs_slurm": functools.cache(lambda: _no_fabric(slurm=True)),
    "needs_sshfs": functools.cache(_no_sshfs),
    "needs_gpu": functools.cache(lambda: None if torch.cuda.is_available() else "no GPU here"),
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot run here, its marker first in the reason; lets tests of time run up to three times; keeps the
    tests of a file on one worker of pytest-xdist unless they say otherwise."""
    for item in items:
        for marker, obstacle in _OBSTACLES.items():
            if item.get_closest_marker(marker) and (reason := obstacle()):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))
        if item.get_closest_marker("timing"):
            item.add_marker(pytest.mark.flaky(reruns=2))
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


# What a machine of continuous integration may be without
_MAY_BE_SKIPPED = ("needs_gpu: ", "no /dev/fuse")


def _skipped(config: pytest.Config) -> list[str]:
    """Tests that were skipped in continuous integration for any reason but the want of a GPU, or of FUSE."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:  # a worker of pytest-xdist reports to another process
        return []
    reports = reporter.stats.get("skipped", [])
    return [report.nodeid for report in reports if not any(each in str(report.longrepr) for each in _MAY_BE_SKIPPED)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In continuous integration a skipped test is a failure, unless it needs a GPU or FUSE."""
    if _skipped(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if names := _skipped(terminalreporter.config):
        allowed = "where only needs_gpu may be, and what needs FUSE"
        terminalreporter.write_line(
            f"failed: skipped in continuous integration, {allowed}: {', '.join(names)}", red=True
        )
