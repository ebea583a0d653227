"""What `hvdlm prepare` and `hvdlm inspect` print may get lost: a data set does not, and nobody is misled."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from forked import hvdlm
from test_prepare import make_texts, start_prepare, write_lines

from hvdlm.data.shard import DataSet

DEADLINE = 60.0  # seconds


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 MB of documents, which take longer than it takes to close a terminal."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_lines(path, make_texts(20_000))
    return path


@pytest.fixture(scope="module")
def data(texts: Path) -> Path:
    assert hvdlm("prepare", "--input", texts, "--output", "data", "--workers", "1", cwd=texts.parent).returncode == 0
    return texts.parent / "data"


def assert_whole(path: Path) -> None:
    shown = hvdlm("inspect", path, "--verify", cwd=path.parent)
    assert shown.returncode == 0, shown.stderr
    assert sum(shard.n_docs for shard in DataSet(path).train.shards) > 19_000


def test_readers_that_have_gone(texts: Path, tmp_path: Path) -> None:
    process = start_prepare(texts, tmp_path, stdout=subprocess.PIPE)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert process.wait(DEADLINE) == 0
    assert_whole(tmp_path / "out")


def test_a_terminal_that_is_closed(texts: Path, tmp_path: Path) -> None:
    terminal, output = pty.openpty()
    process = start_prepare(texts, tmp_path, stdout=output, stderr=output)
    os.close(output)
    os.close(terminal)  # writing fails from now on: Input/output error
    assert process.wait(DEADLINE) == 0
    assert_whole(tmp_path / "out")


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", "<&- >&- 2>&-"])
def test_output_that_cannot_be_written(redirection: str, texts: Path, tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m hvdlm prepare --input {texts} --output out --workers 1 {redirection}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=DEADLINE).returncode == 0
    assert_whole(tmp_path / "out")


def test_an_error_that_cannot_be_written_is_still_an_error(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m hvdlm prepare --input lost --output out >/dev/full 2>/dev/full"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=DEADLINE).returncode == 1


def test_inspect_whose_reader_has_gone(data: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hvdlm", "inspect", str(data), "--verify"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")  # as a program that SIGPIPE ends, which shells know


def test_inspect_whose_output_is_lost(data: Path) -> None:
    command = f"exec {sys.executable} -m hvdlm inspect {data} >/dev/full"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (1, "hvdlm: error: cannot write to stdout: No space left on device\n")
