"""Shards that the system does not let a process read: too many open files, no permission, a disk that fails."""

from __future__ import annotations

import errno
import io
import itertools
import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvdlm.data import shard
from hvdlm.data.file_errors import error_number
from hvdlm.data.inspect import inspect
from hvdlm.data.manifest import Manifest
from hvdlm.data.shard import DataSet, Split
from hvdlm.data.shard_writer import CHUNK_TOKENS, ShardWriter
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError

SHARDS = 40
NOBODY = 65534
FILES = Path("/proc/self/fd")  # that this process has open


def tokens_of(index: int) -> np.ndarray:
    """One document: the number of its shard, again and again; the first shard has two chunks."""
    return np.append(np.full(CHUNK_TOKENS + 10 if index == 0 else 10, index), 256)


def write(directory: Path) -> Path:
    """A data set of SHARDS shards for training."""
    directory.mkdir()
    tokenizer = Tokenizer.byte()
    tokenizer.save(directory / "tokenizer.json")
    records = []
    for index in range(SHARDS):
        with ShardWriter(
            directory,
            f"shard_{index:05}.h5",
            index,
            SHARDS,
            vocab_size=257,
            eos_id=256,
            tokenizer_sha256=tokenizer.sha256,
        ) as writer:
            writer.append(tokens_of(index), len(tokens_of(index)) - 1)
            records.append(writer.finish())
    Manifest(
        vocab_size=257, eos_id=256, tokenizer_sha256=tokenizer.sha256, train=records, validation=[], recipe={}
    ).save(directory)
    return directory


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """Where another user may search the directories above it, unlike in tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield write(Path(folder) / "data")


def in_child(body: Callable[[], str]) -> str:
    """What `body` returns in a forked process, whose limits and user it may change; the sentence of an HvdlmError."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        try:
            answer = body()
        except HvdlmError as error:
            answer = str(error)
        except BaseException as error:
            answer = repr(error)
        sender.send(answer)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    try:
        assert receiver.poll(60), "no answer"
        return str(receiver.recv())
    finally:
        child.kill()
        child.join()


def limit_open_files(more: int) -> None:
    """Lets this process open `more` files beside those that it has open."""
    used = {int(path.name) for path in FILES.iterdir()}
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, more, None))  # of the numbers of files
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def open_all_others() -> None:
    """Leaves this process no file that it may still open."""
    try:
        while True:
            os.open("/dev/null", os.O_RDONLY)
    except OSError as error:
        assert error.errno == errno.EMFILE


def open_shards(directory: Path) -> dict[int, int]:
    """The descriptors of shards of `directory` that this process has open: by shard."""
    found = {}
    for path in FILES.iterdir():
        target = path.resolve()
        if target.parent == directory.resolve() and target.suffix == ".h5":
            found[int(target.stem.removeprefix("shard_"))] = int(path.name)
    return found


def read_all(split: Split) -> None:
    """Twice, since the second time a shard may be one that was closed."""
    for index in 2 * list(range(SHARDS)):
        assert np.array_equal(split.read(index, 0, split.shards[index].n_tokens), tokens_of(index))


def test_more_shards_than_a_process_may_open_files(data: Path) -> None:
    def body() -> str:
        limit_open_files(more=20)
        split = DataSet(data).train
        read_all(split)
        return f"read, {len(open_shards(data))} open"

    read, _, count = in_child(body).partition(", ")
    assert read == "read" and 1 <= int(count.split()[0]) <= 20, count


def test_shards_make_room_where_others_have_opened_files(data: Path) -> None:
    def body() -> str:
        limit_open_files(more=60)
        split = DataSet(data).train
        for index in range(10):
            split.read(index, 0, 1)
        open_all_others()
        read_all(split)
        return "read"

    assert in_child(body) == "read"


def test_shards_that_were_read_last_stay_open(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "OPEN_SHARDS", 3)
    split = DataSet(data).train
    for index in (0, 1, 2, 0, 3, 4):
        split.read(index, 0, 1)
    assert sorted(open_shards(data)) == [0, 3, 4]


def test_no_descriptor_left_at_all(data: Path) -> None:
    def body() -> str:
        split = DataSet(data).train
        limit_open_files(more=5)
        open_all_others()
        split.read(0, 0, 1)
        return "read"

    assert "shard_00000.h5 cannot be read: Too many open files; this process may have " in (said := in_child(body))
    assert "`ulimit -n`" in said and "prepare" not in said and "damaged" not in said


@pytest.mark.parametrize("name", ["shard_00007.h5", "manifest.json", "."])
def test_a_file_that_belongs_to_someone_else_is_not_damaged(name: str, data: Path) -> None:
    file = data / name
    mode = file.stat().st_mode
    file.chmod(0)

    def body(action: Callable[[], object]) -> str:
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        with redirect_stdout(io.StringIO()) as printed:
            try:
                action()
            except HvdlmError as error:
                return f"{error}{printed.getvalue()}"
        return "read"

    try:
        told = [in_child(lambda: body(lambda: DataSet(data))), in_child(lambda: body(lambda: inspect(data, True)))]
    finally:
        file.chmod(mode)
    for sentence in told:
        assert "cannot be read: Permission denied; let user " in sentence
        assert str(data / ("manifest.json" if name == "." else name)) in sentence
        assert "damaged" not in sentence and "again" not in sentence


def break_descriptor(directory: Path, index: int) -> None:
    """Makes reads of an open shard fail with EIO, until it is opened again: an address where no memory is."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    os.dup2(memory, open_shards(directory)[index])
    os.close(memory)


def test_an_error_that_passes_costs_another_try(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shard, "PAUSE", 0.0)
    split = DataSet(data).train
    split.read(0, 0, 10)
    break_descriptor(data, 0)
    assert np.array_equal(split.read(0, CHUNK_TOKENS, 10), tokens_of(0)[CHUNK_TOKENS : CHUNK_TOKENS + 10])
    assert [record.getMessage() for record in caplog.records] == [
        f"{data}/shard_00000.h5: Input/output error; trying again"
    ]


def test_a_disk_that_fails_is_not_a_damaged_shard(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "PAUSE", 0.0)
    split = DataSet(data).train
    opened = shard._open
    files = []

    def fail(path: Path, **options: int) -> h5py.File:
        files.append(opened(path, **options))
        break_descriptor(data, 0)
        return files[-1]

    monkeypatch.setattr(shard, "_open", fail)
    with pytest.raises(HvdlmError, match=r"shard_00000\.h5 cannot be read: Input/output error; .* disk or the network"):
        split.read(0, CHUNK_TOKENS, 10)
    assert len(files) == shard.ATTEMPTS


def test_a_data_set_that_is_gone_while_it_is_read(data: Path, tmp_path: Path) -> None:
    split = DataSet(data).train
    moved = tmp_path / "moved.h5"
    moved.write_bytes((data / "shard_00005.h5").read_bytes())
    (data / "shard_00005.h5").unlink()
    try:
        with pytest.raises(
            HvdlmError, match=r"shard_00005\.h5 cannot be read: No such file or directory; it was moved"
        ):
            split.read(5, 0, 1)
    finally:
        (data / "shard_00005.h5").write_bytes(moved.read_bytes())


def test_what_hdf5_reads_where_a_damaged_file_sends_it_is_damage() -> None:
    """EINVAL is what the system says to an offset below 0; texts are h5py's."""
    text = (
        "Unable to synchronously open object (file read failed: time = Thu, errno = {}, error message = '', offset = 4)"
    )
    assert error_number(KeyError(text.format(5))) == errno.EIO
    assert error_number(OSError("Can't synchronously read data (filter returned failure during read)")) is None
    assert error_number(OSError(text.format(0))) is None
    assert shard.unreadable(Path("x"), OSError(text.format(errno.EINVAL))) is None
