"""What tests/conftest.py does with markers, on a session of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from launcher import Result, run

TESTS = Path(__file__).parents[1]

SESSION = """
from pathlib import Path

import pytest
import torch


@pytest.mark.needs_gpu
def test_gpu():
    assert torch.cuda.is_available()


@pytest.mark.timing
def test_slow_twice():
    tries = Path(__file__).with_name("tries")
    tries.write_text(tries.read_text() + "." if tries.exists() else ".")
    assert tries.read_text() == "..."
"""

SKIPPED = """

def test_other():
    pytest.skip("for no good reason")
"""


def session(folder: Path, tests: str, ci: str) -> Result:
    folder.mkdir()
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_session.py").write_text(tests, encoding="utf-8")
    words = ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    return run([sys.executable, "-m", "pytest", *words, str(folder)], extra={"CI": ci})


def test_only_the_want_of_a_gpu_may_skip_in_continuous_integration(tmp_path: Path) -> None:
    """And a test of time may fail twice."""
    good = session(tmp_path / "good", SESSION, ci="true")
    assert good.status == 0, good.output
    assert (tmp_path / "good" / "tries").read_text() == "..."
    skipped = session(tmp_path / "skipped", SESSION + SKIPPED, ci="true")
    assert skipped.status == 1, skipped.output
    allowed = "where only needs_gpu may be, and what needs FUSE"
    assert f"{allowed}: test_session.py::test_other" in skipped.output
    assert session(tmp_path / "elsewhere", SESSION + SKIPPED, ci="").status == 0
