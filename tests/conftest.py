"""What several test folders use: the launcher module, and a small data set made once."""

from __future__ import annotations

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
