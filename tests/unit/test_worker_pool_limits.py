"""Worker processes that a host does not let be started: then one process does the work, and says so."""

from __future__ import annotations

import errno
import multiprocessing.popen_spawn_posix
import multiprocessing.synchronize
import threading
from concurrent.futures.process import _ExecutorManagerThread
from pathlib import Path
from typing import Any

import psutil
import pytest

from hvdlm.cli import main
from hvdlm.data.shard import DataSet
from hvdlm.data.worker_pool import WorkerPool


def assert_one_process_works(caplog: pytest.LogCaptureFixture, *words: str) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with WorkerPool(4) as pool:
        assert list(pool.map(abs, range(-20, 0))) == list(range(20, 0, -1))
    (record,) = caplog.records
    assert record.levelname in ("WARNING", "warning: ")
    assert record.getMessage().startswith("no worker processes can be started (")
    assert "so one does the work; " in record.getMessage()
    for word in words:
        assert word in record.getMessage()
    left = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
    assert [each for each in left if "spawn_main" in " ".join(each.cmdline())] == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOENT, errno.EACCES, errno.ENOSYS, errno.ENOSPC])
def test_no_usable_shared_memory(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where /dev/shm is read-only, missing, of another user, or full."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "no semaphore")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fail)
    assert_one_process_works(caplog, "no semaphore", "/dev/shm")


@pytest.mark.parametrize("started", [0, 1, 3])
def test_a_limit_on_processes(started: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    launch = multiprocessing.popen_spawn_posix.Popen._launch  # type: ignore[attr-defined]
    calls = []

    def fail(self: Any, process: Any) -> None:
        calls.append(process)
        if len(calls) > started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        launch(self, process)

    monkeypatch.setattr(multiprocessing.popen_spawn_posix.Popen, "_launch", fail)
    assert_one_process_works(caplog, "Resource temporarily unavailable", "ulimit -u")


def test_a_limit_on_threads(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_ExecutorManagerThread, "start", fail)
    assert_one_process_works(caplog, "can't start new thread", "ulimit -u")


def test_a_data_set_is_prepared_without_worker_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fail)
    (tmp_path / "in.txt").write_text("some text")
    words = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out")]
    assert main(["prepare", *words, "--shards", "1", "--validation", "0", "--workers", "2"]) == 0
    assert DataSet(tmp_path / "out").train.read(0, 0, 9).tolist() == list(b"some text")
    assert "Read-only file system" in caplog.text
