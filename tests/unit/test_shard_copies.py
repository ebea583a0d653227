"""Copies of shards on a disk of a host: what is read of them, who makes them, and what a fault leaves of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import flip_bit, small_disk

from hvdlm.data import shard_copies
from hvdlm.data.cached_split import CachedSplit, read_copies
from hvdlm.data.manifest import Manifest
from hvdlm.data.shard import DataSet
from hvdlm.data.shard_copies import ShardCopies
from hvdlm.data.shard_writer import ShardWriter
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError

SHARDS = 4
TOKENS = 300_000  # of each, in several chunks
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of four training shards and one for validation."""
    directory = tmp_path_factory.mktemp("copies") / "data"
    directory.mkdir()
    tokenizer = Tokenizer.byte()
    tokenizer.save(directory / "tokenizer.json")
    generator = np.random.default_rng(0)
    files = [(f"shard_{index:05}.h5", index, SHARDS) for index in range(SHARDS)] + [("val/shard_00000.h5", 0, 1)]
    facts: dict[str, Any] = {"vocab_size": 257, "eos_id": 256, "tokenizer_sha256": tokenizer.sha256}
    records = []
    for file, index, count in files:
        with ShardWriter(directory, file, index, count, **facts) as writer:
            writer.append(np.append(generator.integers(0, 256, TOKENS - 1), 256), TOKENS - 1)
            records.append(writer.finish())
    train, validation = records[:SHARDS], records[SHARDS:]
    Manifest(**facts, train=train, validation=validation, recipe={"made": "by a test"}).save(directory)
    return directory


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


@pytest.fixture
def cached(source: Path, tmp_path: Path) -> Iterator[Callable[..., CachedSplit]]:
    """Opens the training split with copies in "cache"; at the end all threads are."""
    opened = []

    def open_split(cache: Path = tmp_path / "cache") -> CachedSplit:
        data = DataSet(source)
        read_copies(data, str(cache))
        assert isinstance(data.train, CachedSplit)
        opened.append(data.train)
        return data.train

    yield open_split
    for split in opened:
        split._copies.close()


def copies_in(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "not within 30 s"
        time.sleep(0.01)


def wait_for_copies(split: CachedSplit, *shards: int) -> None:
    wait_until(lambda: all(split._copies.has(f"shard_{shard:05}.h5") for shard in shards))


def assert_reads_as(split: CachedSplit, source: Path) -> None:
    plain = DataSet(source).train
    for shard in range(SHARDS):
        for start in (0, 1, TOKENS // 2, TOKENS - 200):
            assert np.array_equal(split.read(shard, start, 200), plain.read(shard, start, 200))
        assert np.array_equal(split.document_offsets(shard), plain.document_offsets(shard))


def test_what_was_read_or_asked_for_is_read_from_copies(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path
) -> None:
    split = cached()
    split.will_read([2])
    wait_for_copies(split, 2)
    split.read(2, 0, 10)
    assert split.count == (1, 1)
    split.read(0, 0, 10)
    wait_for_copies(split, 0)
    split.read(0, 0, 10)
    assert split.count == (3, 2) or split.count == (3, 3)  # the copy may be there at once
    names = [path.name for path in copies_in(tmp_path / "cache")]
    assert names == ["shard_00000.h5", "shard_00002.h5"]  # no other, and nothing unfinished
    for path in copies_in(tmp_path / "cache"):
        assert path.read_bytes() == (source / path.name).read_bytes()


def test_copies_are_what_is_read(cached: Callable[..., CachedSplit], source: Path) -> None:
    split = cached()
    split.will_read(range(SHARDS))
    wait_for_copies(split, *range(SHARDS))
    expected = DataSet(source).train.read(3, 100, 50)
    for path in source.glob("shard_*.h5"):
        path.unlink()
    assert np.array_equal(split.read(3, 100, 50), expected)


def test_copies_of_another_run_are_taken(cached: Callable[..., CachedSplit], source: Path, tmp_path: Path) -> None:
    first = cached()
    first.will_read(range(SHARDS))
    wait_for_copies(first, *range(SHARDS))
    before = {path: path.stat().st_ino for path in copies_in(tmp_path / "cache")}
    second = cached()
    second.will_read(range(SHARDS))
    wait_for_copies(second, *range(SHARDS))
    assert {path: path.stat().st_ino for path in copies_in(tmp_path / "cache")} == before
    assert_reads_as(second, source)


@pytest.mark.parametrize("damage", ["shorter", "longer", "empty", "of another shard"])
def test_a_copy_that_is_not_whole_is_made_again(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path, damage: str
) -> None:
    first = cached()
    first.will_read([0, 1])
    wait_for_copies(first, 0, 1)
    copy, other = copies_in(tmp_path / "cache")
    content = copy.read_bytes()
    broken = {"shorter": content[:-1], "longer": content + b"0", "empty": b"", "of another shard": other.read_bytes()}
    copy.write_bytes(broken[damage])
    second = cached()
    second.will_read([0])
    wait_for_copies(second, 0)
    assert copy.read_bytes() == content
    assert_reads_as(second, source)


def test_a_flipped_bit_in_a_copy_costs_a_copy(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = cached()
    first.will_read([0])
    wait_for_copies(first, 0)
    (copy,) = copies_in(tmp_path / "cache")
    flip_bit(copy)
    split = cached()
    split.will_read([0])
    wait_for_copies(split, 0)
    assert_reads_as(split, source)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith(f"the copy {copy} cannot be read (") and "made again" in said
    wait_for_copies(split, 0)
    assert copy.read_bytes() == (source / "shard_00000.h5").read_bytes()


def test_a_disk_that_damages_copies_is_given_up(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        split = cached()
        split.will_read([0])
        wait_for_copies(split, 0)
    for _ in range(2):
        wait_for_copies(split, 0)
        flip_bit(copies_in(tmp_path / "cache")[0])
        split._local.close(0)
        assert_reads_as(split, source)
    time.sleep(0.5)
    assert not split._copies.has("shard_00000.h5")
    assert "is not used any more" in caplog.text
    assert_reads_as(split, source)


def test_a_shard_that_is_damaged_itself_is_not_copied(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = cached()
    flip_bit(source / "shard_00001.h5")
    split.will_read([1])
    wait_until(lambda: "is not copied to" in caplog.text)
    assert not copies_in(tmp_path / "cache")
    with pytest.raises(HvdlmError, match=f"{source / 'shard_00001.h5'} cannot be read at chunk"):
        for start in range(0, TOKENS, 1000):
            split.read(1, start, 1000)


@pytest.mark.needs_root
def test_a_full_disk_is_told_once_and_holds_what_fits(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = (source / "shard_00000.h5").stat().st_size
    with small_disk(tmp_path / "disk", str(size * 5 // 2)):
        split = cached(tmp_path / "disk")
        split.will_read(range(SHARDS))
        wait_until(lambda: "is full" in caplog.text)
        assert_reads_as(split, source)
        assert len(copies_in(tmp_path / "disk")) == 2
        (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert said.startswith("data.cache: the disk of ") and "are read from" in said
        assert split.count.hits
        split._copies.close()
        for shard in range(SHARDS):
            split._local.close(shard)


def copy_slowly(source: Path, cache: Path, pause: float) -> None:
    """Copies all shards in small blocks, with a pause before each."""
    shard_copies.BLOCK_BYTES = 2**14
    is_open = ShardCopies._check_open

    def wait(copies: ShardCopies) -> None:
        time.sleep(pause)
        is_open(copies)

    ShardCopies._check_open = wait  # type: ignore[assignment, method-assign]
    data = DataSet(source)
    read_copies(data, str(cache))
    assert isinstance(data.train, CachedSplit)
    data.train.will_read(range(SHARDS))
    wait_for_copies(data.train, *range(SHARDS))
    os._exit(0)


def start_slow_copy(source: Path, cache: Path, pause: float) -> BaseProcess:
    process = FORK.Process(target=copy_slowly, args=(source, cache, pause))
    process.start()
    wait_until(lambda: any(path.suffix == ".partial" and path.stat().st_size for path in copies_in(cache)))
    return process


def test_a_process_that_is_killed_in_mid_copy_leaves_nothing_that_is_read(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path
) -> None:
    process = start_slow_copy(source, tmp_path / "cache", 0.05)
    assert process.pid is not None
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (torn,) = copies_in(tmp_path / "cache")
    assert torn.name == "shard_00000.h5.partial"
    split = cached()
    split.will_read(range(SHARDS))
    wait_for_copies(split, *range(SHARDS))
    assert [path.suffix for path in copies_in(tmp_path / "cache")] == [".h5"] * SHARDS
    assert_reads_as(split, source)


def test_two_processes_make_each_copy_once(
    cached: Callable[..., CachedSplit], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the other makes the first copy, this one makes those behind it, and waits for that one only."""
    made: list[str] = []
    copy = ShardCopies._copy

    def note(copies: ShardCopies, file: str) -> None:
        made.append(file)
        copy(copies, file)

    monkeypatch.setattr(ShardCopies, "_copy", note)
    process = start_slow_copy(source, tmp_path / "cache", 0.02)
    split = cached()
    split.will_read(range(SHARDS))
    assert_reads_as(split, source)
    wait_for_copies(split, *range(SHARDS))
    process.join(30)
    assert process.exitcode == 0
    assert "shard_00000.h5" not in made and len(made) == len(set(made))
    assert [path.name for path in copies_in(tmp_path / "cache")] == [f"shard_{index:05}.h5" for index in range(SHARDS)]


def test_the_directory_is_of_each_host(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path / "local"))
    data = DataSet(source)
    read_copies(data, "${LOCAL_DISK}/shards")
    assert isinstance(data.train, CachedSplit)
    data.train._copies.close()
    assert (tmp_path / "local/shards" / data.fingerprint[:16]).is_dir()
    monkeypatch.setenv("EMPTY", "")
    for cache, why in (
        ("$NO_SUCH_DISK/shards", "NO_SUCH_DISK is not set here"),
        ("${EMPTY}/shards", "EMPTY is not set here"),
        ("~nobody-of-that-name/shards", "begins with the home of a user who is not here"),
    ):
        with pytest.raises(HvdlmError, match=why):
            read_copies(data, cache)


def test_a_directory_that_cannot_be_made_is_one_sentence(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HvdlmError, match=r"data.cache: nothing can be written to .* name a directory on a disk"):
        read_copies(DataSet(source), str(tmp_path / "file"))
