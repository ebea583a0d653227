"""What several test folders use: the launcher module, and a small data set made once."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "parallel"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level data set of some packages of the standard library, 6 shards."""
    directory = tmp_path_factory.mktemp("data") / "small"
    library = Path(sysconfig.get_path("stdlib"))
    sources = [str(library / package / "*.py") for package in ("asyncio", "email", "json", "logging", "unittest")]
    command = [sys.executable, "-m", "hvdlm", "prepare", "--input", *sources, "--output", str(directory)]
    subprocess.run([*command, "--shards", "6", "--validation", "0.1", "--skip-bad"], check=True)
    return directory
