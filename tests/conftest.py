"""What several test folders use: the launcher module, a small data set made once, and no silent skips in CI."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "parallel"))


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In continuous integration a test may be skipped for want of a GPU or of root, and for nothing else."""
    if not os.environ.get("CI"):
        return
    wants = ("GPU", "only root may")
    reports = terminalreporter.stats.get("skipped", [])
    skipped = [report for report in reports if not any(want in str(report.longrepr) for want in wants)]
    if skipped:
        names = ", ".join(report.nodeid for report in skipped)
        pytest.exit(f"skipped in continuous integration, which must run every test: {names}", returncode=1)
