"""Shards and manifest: what is stored, and that damage is detected."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import shutil
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
import pytest
from forked import hvdlm

from hvdlm.data.manifest import Manifest
from hvdlm.data.shard import DataSet, Split
from hvdlm.data.shard_writer import CHUNK_TOKENS, ShardWriter
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError

# Lengths in tokens at and around the size of a chunk.
LENGTHS = {"shard_00000.h5": [1, 3, CHUNK_TOKENS - 4], "shard_00001.h5": [2 * CHUNK_TOKENS + 7, 5, CHUNK_TOKENS]}
VALIDATION_LENGTHS = {"val/shard_00000.h5": [40, 2]}


def make_documents(lengths: list[int], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [np.append(generator.integers(0, 256, length - 1), 256) for length in lengths]


def write(directory: Path, vocab_size: int = 257, seed: int = 0) -> Path:
    directory.mkdir()
    tokenizer = Tokenizer.byte()
    tokenizer.save(directory / "tokenizer.json")
    records = []
    for group in (LENGTHS, VALIDATION_LENGTHS):
        for index, (file, lengths) in enumerate(group.items()):
            with ShardWriter(
                directory, file, index, len(group), vocab_size=vocab_size, eos_id=256, tokenizer_sha256=tokenizer.sha256
            ) as writer:
                for document in make_documents(lengths, seed + len(records)):
                    writer.append(document, len(document) - 1)
                records.append(writer.finish())
    Manifest(
        vocab_size=vocab_size,
        eos_id=256,
        tokenizer_sha256=tokenizer.sha256,
        train=records[:2],
        validation=records[2:],
        recipe={"made": "by a test"},
    ).save(directory)
    return directory


def read_all(split: Split) -> list[np.ndarray]:
    return [split.read(shard, 0, info.n_tokens) for shard, info in enumerate(split.shards)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def inspect(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return hvdlm("inspect", path, *arguments, cwd=path.parent)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_what_is_written_is_read(vocab_size: int, dtype: type, tmp_path: Path) -> None:
    data = DataSet(write(tmp_path / "data", vocab_size))
    expected = [np.concatenate(make_documents(lengths, seed)) for seed, lengths in enumerate(LENGTHS.values())]
    for shard, tokens in enumerate(expected):
        info = data.train.shards[shard]
        assert (info.n_tokens, info.n_docs, info.n_bytes) == (len(tokens), 3, len(tokens) - 3)
        assert data.train.read(shard, 0, len(tokens)).dtype == dtype
        assert np.array_equal(data.train.read(shard, 0, len(tokens)), tokens)
        middle = data.train.read(shard, CHUNK_TOKENS - 3, 3)  # up to the last token of a chunk
        assert np.array_equal(middle, tokens[CHUNK_TOKENS - 3 : CHUNK_TOKENS])
    across = data.train.read(1, CHUNK_TOKENS - 2, 5)
    assert np.array_equal(across, expected[1][CHUNK_TOKENS - 2 : CHUNK_TOKENS + 3])
    assert data.train.document_offsets(1).tolist() == np.cumsum([0, *LENGTHS["shard_00001.h5"]]).tolist()
    assert (data.vocab_size, data.eos_id, data.tokenizer_path.name) == (vocab_size, 256, "tokenizer.json")


def test_blocks_overlap_and_cover(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.data.shard.BLOCK_TOKENS", 50_000)
    split = DataSet(pristine).train
    blocks = list(split.blocks(1, overlap=1))
    assert len(blocks) > 2
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(blocks))
    joined = np.concatenate([blocks[0], *(block[1:] for block in blocks[1:])])
    assert np.array_equal(joined, read_all(split)[1])


def test_layout_is_as_documented(pristine: Path) -> None:
    with h5py.File(pristine / "shard_00001.h5") as file:
        assert file["tokens"].chunks == (64 * 1024,)
        assert file["tokens"].fletcher32
        assert file["doc_offsets"].fletcher32
        assert file["doc_offsets"].dtype == np.uint64
        assert set(file.attrs) == {
            "format", "version", "shard_index", "num_shards", "n_tokens", "n_docs", "n_bytes", "vocab_size", "eos_id",
            "tokenizer_sha256", "tokens_sha256", "complete",
        }  # fmt: skip
        assert (file.attrs["shard_index"], file.attrs["num_shards"], bool(file.attrs["complete"])) == (1, 2, True)


def test_fingerprint_names_the_tokens(pristine: Path, tmp_path: Path) -> None:
    same, other = write(tmp_path / "same"), write(tmp_path / "other", seed=9)
    assert DataSet(same).fingerprint == DataSet(pristine).fingerprint
    assert DataSet(other).fingerprint != DataSet(pristine).fingerprint


def test_reading_beyond_the_end_raises_index_error(pristine: Path) -> None:
    split = DataSet(pristine).validation
    with pytest.raises(IndexError):
        split.read(0, 40, 3)


def _read_in_child(split: Split, answer: Connection) -> None:
    answer.send(split.read(0, 0, 10).tolist())


def test_a_forked_process_opens_files_of_its_own(pristine: Path) -> None:
    split = DataSet(pristine).train
    expected = split.read(0, 0, 10).tolist()
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    child = fork.Process(target=_read_in_child, args=(split, sender))
    child.start()
    child.join()
    assert receiver.recv() == expected
    assert split.read(0, 0, 10).tolist() == expected


def test_inspect_shows_the_counts(pristine: Path) -> None:
    for arguments in ((), ("--verify",)):
        shown = inspect(pristine, *arguments)
        assert shown.returncode == 0
        assert "shard_00001.h5" in shown.stdout
        assert f"{sum(LENGTHS['shard_00001.h5']):,}" in shown.stdout
        assert DataSet(pristine).fingerprint in shown.stdout
        assert ("every token and every hash is as it was written" in shown.stdout) == bool(arguments)


def truncate(data: Path) -> None:
    path = data / "shard_00001.h5"
    path.write_bytes(path.read_bytes()[:-1000])


def delete(data: Path) -> None:
    (data / "shard_00001.h5").unlink()


def swap(data: Path) -> None:
    (data / "shard_00000.h5").rename(data / "other")
    (data / "shard_00001.h5").rename(data / "shard_00000.h5")
    (data / "other").rename(data / "shard_00001.h5")


def swap_equal_sizes(data: Path) -> None:
    """As `swap`, with a manifest whose sizes are swapped too."""
    swap(data)
    manifest = Manifest.load(data)
    sizes = [shard.size for shard in manifest.train]
    train = [shard.model_copy(update={"size": size}) for shard, size in zip(manifest.train, sizes[::-1], strict=True)]
    manifest.model_copy(update={"train": train}).save(data)


def replace_by_another(data: Path) -> None:
    other = write(data.parent / "other", seed=9)
    shutil.copy(other / "shard_00001.h5", data / "shard_00001.h5")


def unmark(data: Path) -> None:
    with h5py.File(data / "shard_00001.h5", "r+", libver="latest") as file:
        del file.attrs["complete"]
    resize(data)


def resize(data: Path) -> None:
    """Puts the new size of shard 1 into the manifest, so that the damage is not detected by the size."""
    manifest = Manifest.load(data)
    size = (data / "shard_00001.h5").stat().st_size
    train = [manifest.train[0], manifest.train[1].model_copy(update={"size": size})]
    manifest.model_copy(update={"train": train}).save(data)


def overwrite(data: Path) -> None:
    path = data / "shard_00001.h5"
    path.write_bytes(bytes(path.stat().st_size))


def lose_manifest(data: Path) -> None:
    (data / "manifest.json").unlink()


def edit_manifest(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text().replace('"n_docs": 3', '"n_docs": 4', 1))


def cut_manifest(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text()[:-100])


def newer_manifest(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))


def foreign_manifest(data: Path) -> None:
    (data / "manifest.json").write_text('{"name": "a web app"}')


def lose_tokenizer(data: Path) -> None:
    (data / "tokenizer.json").unlink()


def lose_everything(data: Path) -> None:
    shutil.rmtree(data)


def empty(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "data/shard_00001.h5 has 5"),
        (delete, "the shard .*data/shard_00001.h5 is missing"),
        (swap, "data/shard_00000.h5 has .* bytes where the manifest says"),
        (swap_equal_sizes, "data/shard_00000.h5 has .* tokens where the manifest says"),
        (replace_by_another, "data/shard_00001.h5 belongs elsewhere: its tokens_sha256 is"),
        (unmark, "data/shard_00001.h5 is unfinished: it is not marked complete"),
        (overwrite, "data/shard_00001.h5 is damaged"),
        (lose_manifest, "data is an unfinished data set: it has shards but no manifest.json; remove it and run"),
        (edit_manifest, "data/manifest.json is damaged .its contents do not match its own hash.; prepare"),
        (cut_manifest, "data/manifest.json is damaged .*; prepare the data set again"),
        (newer_manifest, "manifest.json has format version 3, but this hvdlm reads versions 1 and 2; install"),
        (foreign_manifest, "data is not a data set of `hvdlm prepare`"),
        (lose_tokenizer, "data/tokenizer.json is missing; prepare the data set again"),
        (lose_everything, "data: no such data set; write it with `hvdlm prepare --output"),
        (empty, "data is not a data set: it has no manifest.json; write one with `hvdlm prepare`"),
    ],
)
def test_damage_is_found_on_opening(damage: Callable[[Path], None], message: str, data: Path) -> None:
    damage(data)
    with pytest.raises(HvdlmError, match=message):
        DataSet(data)
    for arguments in ((), ("--verify",)):
        shown = inspect(data, *arguments)
        assert shown.returncode == 1
        assert "Traceback" not in shown.stderr
        assert shown.stderr.startswith("hvdlm: error: ")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def chunk_position(path: Path, name: str, chunk: int) -> int:
    with h5py.File(path) as file:
        return int(file[name].id.get_chunk_info(chunk).byte_offset)


def test_a_flipped_bit_is_named_with_its_chunk(data: Path) -> None:
    path = data / "shard_00001.h5"
    flip(path, chunk_position(path, "tokens", 2) + 99)
    split = DataSet(data).train
    assert len(split.read(1, 0, 2 * CHUNK_TOKENS)) == 2 * CHUNK_TOKENS
    with pytest.raises(HvdlmError, match=r"shard_00001\.h5 cannot be read at chunk 2 of its tokens .*--verify"):
        split.read(1, CHUNK_TOKENS + 5, 2 * CHUNK_TOKENS)


def test_verify_lists_every_damaged_file(data: Path) -> None:
    flip(data / "shard_00000.h5", chunk_position(data / "shard_00000.h5", "tokens", 0))
    flip(data / "shard_00001.h5", chunk_position(data / "shard_00001.h5", "doc_offsets", 0) + 8)
    flip(data / "tokenizer.json", 30)
    (data / "val" / "shard_00000.h5").unlink()
    shown = inspect(data, "--verify")
    assert shown.returncode == 1
    assert [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("damaged: /")] == [
        str(data / "tokenizer.json"),
        str(data / "shard_00000.h5"),
        str(data / "shard_00001.h5"),
    ]
    assert f"damaged: the shard {data / 'val' / 'shard_00000.h5'} is missing" in shown.stdout
    assert "4 of its files are bad (listed above)" in shown.stderr


def test_no_flipped_bit_changes_a_token_undetected(pristine: Path, data: Path) -> None:
    expected = read_all(DataSet(pristine).train)
    path = data / "shard_00000.h5"
    content = path.read_bytes()
    chunks = [
        range(start, start + size)
        for start, size in ((chunk_position(path, "tokens", 0), 2**17), (chunk_position(path, "doc_offsets", 0), 2**16))
    ]
    metadata = [position for position in range(len(content)) if not any(position in chunk for chunk in chunks)]
    generator = random.Random(0)
    caught = 0
    for position in [*generator.sample(chunks[0], 10), *generator.sample(metadata, 150)]:
        flip(path, position)
        try:
            found = read_all(DataSet(data).train)
        except HvdlmError as error:
            assert "shard_00000.h5" in str(error)
            caught += 1
        else:
            # The bit was in space that HDF5 does not use, or in the document offsets, which were not read.
            assert position not in chunks[0]
            assert all(map(np.array_equal, found, expected))
        path.write_bytes(content)
    assert caught > 10
