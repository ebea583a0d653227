"""The loader: the right tokens, the same on any number of ranks and from any start, and no thread left running."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.loader import Batch, Loader, validation_batches
from hvdlm.data.prepare import prepare
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.sampler import Sampler, rank_part
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.targets import IGNORE

LENGTH = 16
BATCH = 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = random.Random(0)
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} " + "abcdefgh" * generator.randint(1, 30))
    prepare(
        inputs=[str(tmp_path / "*.txt")],
        output=tmp_path / "data",
        tokenizer="byte",
        shards=4,
        validation=0.2,
        workers=1,
        text_key="text",
        seed=0,
        skip_bad=False,
    )
    return tmp_path / "data"


def read(path: Path, count: int, rank: int = 0, size: int = 1, start: int = 0, seed: int = 5) -> list[Batch]:
    with Loader(
        DataSet(path), LENGTH, RankParts(BatchSizes(BATCH), size), seed, rank, read_ahead=2, start=start
    ) as loader:
        return [loader.next() for _ in range(count)]


def same(left: Batch, right: Batch) -> bool:
    return left.index == right.index and left.inputs.equal(right.inputs) and left.targets.equal(right.targets)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hvdlm-loader"]


def stored_tokens(file: Path) -> np.ndarray:
    with h5py.File(file) as opened:
        return opened["tokens"][:].astype(np.int64)


def test_sequences_of_a_damaged_shard_are_told_and_have_no_targets(path: Path) -> None:
    """Whatever the number of ranks; all others are as before."""
    whole = [read(path, 6, rank, 3) for rank in range(3)]
    shard = path / "shard_00001.h5"
    content = shard.read_bytes()
    with h5py.File(shard) as file:
        offset = file["tokens"].id.get_chunk_info(0).byte_offset
    shard.write_bytes(content[: offset + 5] + bytes([content[offset + 5] ^ 1]) + content[offset + 6 :])
    data = DataSet(path)
    windows = [(each.n_tokens - 1) // LENGTH for each in data.train.shards]
    sampler = Sampler(windows, BatchSizes(BATCH), 5, data.fingerprint)
    drawn = [shard for index in range(6) for shard in sampler.batch(index)[0]]
    left_out = 0
    for rank in range(3):
        with Loader(
            data, LENGTH, RankParts(BatchSizes(BATCH), 3), 5, rank, read_ahead=2, skip_unreadable=True
        ) as loader:
            for expected in whole[rank]:
                batch = loader.next()
                is_out = (batch.targets == IGNORE).all(dim=1)
                assert int(is_out.sum()) == len(batch.errors)
                assert all("shard_00001.h5 cannot be read" in error for error in batch.errors)
                assert batch.inputs[~is_out].equal(expected.inputs[~is_out])
                assert batch.targets[~is_out].equal(expected.targets[~is_out])
                left_out += len(batch.errors)
    assert left_out == drawn.count(1) > 0  # it has one chunk


def test_sequences_of_a_shard_that_is_gone(path: Path) -> None:
    data = DataSet(path)
    (path / "shard_00001.h5").unlink()
    with Loader(data, LENGTH, RankParts(BatchSizes(BATCH), 1), 5, 0, 2, skip_unreadable=True) as loader:
        errors = loader.next().errors
    assert errors
    assert all("No such file" in error for error in errors)


def test_batches_are_the_sampler_s_windows(path: Path) -> None:
    data = DataSet(path)
    shards = [stored_tokens(path / f"shard_{i:05}.h5") for i in range(4)]
    sampler = Sampler([(len(tokens) - 1) // LENGTH for tokens in shards], BatchSizes(BATCH), 5, data.fingerprint)
    for k, batch in enumerate(read(path, 30)):
        assert batch.index == k
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape == (BATCH, LENGTH)
        assert batch.inputs.is_contiguous()
        assert batch.targets.is_contiguous()
        for row, (shard, window) in enumerate(zip(*sampler.batch(k), strict=True)):
            tokens = shards[shard][window * LENGTH : (window + 1) * LENGTH + 1]
            assert batch.inputs[row].tolist() == tokens[:-1].tolist()
            assert batch.targets[row].tolist() == tokens[1:].tolist()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 11])
def test_all_ranks_together_read_the_global_batch(path: Path, size: int) -> None:
    ranks = [read(path, 5, rank, size) for rank in range(size)]
    for k, whole in enumerate(read(path, 5)):
        assert torch.cat([own[k].inputs for own in ranks]).equal(whole.inputs)
        assert torch.cat([own[k].targets for own in ranks]).equal(whole.targets)
    assert [len(own[0].inputs) for own in ranks] == [len(rank_part(BATCH, rank, size)) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 3, BATCH])
def test_replaced_tokens_are_inputs_alone(path: Path, size: int) -> None:
    """The same on any number of ranks, also where each has one sequence, whose targets are as they were read."""
    for rank in range(size):
        parts = RankParts(BatchSizes(BATCH), size)
        with Loader(DataSet(path), LENGTH, parts, 5, rank, read_ahead=2, token_dropout=0.3) as loader:
            for k in range(4):
                whole, own, batch = read(path, k + 1)[k], read(path, k + 1, rank, size)[k], loader.next()
                assert batch.targets.equal(own.targets)
                assert not batch.inputs.equal(own.inputs)
                assert len(whole.targets) == BATCH


def test_resuming_from_a_state(path: Path) -> None:
    expected = read(path, 12)
    with Loader(DataSet(path), LENGTH, RankParts(BatchSizes(BATCH), 1), 5, 0, read_ahead=4) as loader:
        for _ in range(7):
            loader.next()
        state = loader.state_dict()
    assert state == {"seed": 5, "batch": 7}
    assert all(map(same, read(path, 5, start=state["batch"], seed=state["seed"]), expected[7:]))


def test_seed_changes_the_order(path: Path) -> None:
    assert not read(path, 1, seed=5)[0].inputs.equal(read(path, 1, seed=6)[0].inputs)


def test_state_is_what_was_delivered_not_what_was_read(path: Path) -> None:
    with Loader(DataSet(path), LENGTH, RankParts(BatchSizes(BATCH), 1), 5, 0, read_ahead=8, start=3) as loader:
        assert loader.state_dict() == {"seed": 5, "batch": 3}
        loader.next()
        assert loader.state_dict() == {"seed": 5, "batch": 4}


def test_reading_ahead_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Sampler.batch

    def counted(self: Sampler, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(k)
        return original(self, k)

    monkeypatch.setattr(Sampler, "batch", counted)
    with Loader(DataSet(path), LENGTH, RankParts(BatchSizes(BATCH), 1), 5, 0, read_ahead=3) as loader:
        loader.next()
        time.sleep(0.3)  # enough time to read hundreds of batches
        # One delivered, three in the queue, one read and waiting for room in the queue.
        assert asked == [0, 1, 2, 3, 4]


def test_closing_ends_the_thread(path: Path) -> None:
    for taken in (0, 1, 5):
        loader = Loader(DataSet(path), LENGTH, RankParts(BatchSizes(BATCH), 1), 5, 0, read_ahead=1)
        for _ in range(taken):
            loader.next()
        assert len(loader_threads()) == 1
        loader.close()
        assert not loader_threads()
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            loader.next()


def test_a_process_that_forgets_to_close_still_ends(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hvdlm.data.loader import Loader; "
        "from hvdlm.config.batch_sizes import BatchSizes; "
        "from hvdlm.data.rank_parts import RankParts; from hvdlm.data.shard import DataSet; parts = "
        "RankParts(BatchSizes(8), 1); loader = Loader(DataSet(Path(sys.argv[1])), 16, parts, 0, 0, 2); "
        "print(loader.next().index)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0\n")


def test_damage_is_raised_by_the_batch_it_hits(path: Path) -> None:
    data = DataSet(path)
    sampler = Sampler([(info.n_tokens - 1) // LENGTH for info in data.train.shards], BatchSizes(1), 5, data.fingerprint)
    shards = [int(sampler.batch(k)[0][0]) for k in range(100)]
    first_hit = next(k for k in range(100) if shards[k] != shards[0])
    file = data.train.shards[shards[first_hit]].path
    with h5py.File(file) as opened:
        position = opened["tokens"].id.get_chunk_info(0).byte_offset
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with Loader(data, LENGTH, RankParts(BatchSizes(1), 1), 5, 0, read_ahead=50) as loader:
        assert [loader.next().index for _ in range(first_hit)] == list(range(first_hit))
        for _ in range(2):
            with pytest.raises(HvdlmError, match=f"{file.name} cannot be read at chunk 0"):
                loader.next()
        assert loader.state_dict()["batch"] == first_hit
    assert not loader_threads()


def test_too_long_a_context_says_so(path: Path) -> None:
    with pytest.raises(HvdlmError, match=r"hold no whole sequence; shorten model\.context_length"):
        Loader(DataSet(path), 100_000, RankParts(BatchSizes(BATCH), 1), 5, 0, read_ahead=1)
    assert not loader_threads()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [7, LENGTH, 5000])
def test_validation_predicts_every_token_but_the_first_once(path: Path, size: int, length: int) -> None:
    tokens = stored_tokens(path / "val" / "shard_00000.h5")
    batches = [batch for rank in range(size) for batch in validation_batches(DataSet(path), length, 3, rank, size)]
    inputs = torch.cat([batch.inputs.flatten() for batch in batches])
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    predicted = targets != IGNORE
    assert targets[predicted].tolist() == tokens[1:].tolist()
    assert inputs[predicted].tolist() == tokens[:-1].tolist()
    assert (inputs[~predicted] == 256).all()
    assert all(len(batch.inputs) <= 3 and batch.inputs.shape[1] == length for batch in batches)


@pytest.mark.parametrize("size", [1, 3])
def test_validation_can_be_limited(path: Path, size: int) -> None:
    tokens = stored_tokens(path / "val" / "shard_00000.h5")
    data = DataSet(path)
    ranks = [list(validation_batches(data, LENGTH, 2, rank, size, limit=5)) for rank in range(size)]
    rows = torch.cat([batch.targets for own in ranks for batch in own])
    assert rows.flatten().tolist() == tokens[1 : 5 * LENGTH + 1].tolist()
    assert [batch.index for batch in ranks[0]] == list(range(len(ranks[0])))
