"""Sources with weights: their shares of every prefix, the order of samples, what is written, and bad weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from forked import hvdlm
from test_prepare import contents, make_texts, stored_documents, write_lines
from test_sampler import network, rank_part

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.loader import Loader, training_sampler, validation_batches
from hvdlm.data.manifest import Manifest
from hvdlm.data.mixture import Mixture
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.sampler import ROUNDS, MixtureSampler, Sampler
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError

WEIGHTS = [[1.0], [0.7, 0.3], [1, 1, 1], [5, 0.25, 2, 0.75], [90, *[1] * 10], [0.333333333, 0.666666667], [2e-5, 1.0]]


def test_seven_of_ten_by_hand() -> None:
    """Windows of the tasks, in draws: seven tenths 0-2 1-3 2-5 4-6 5-8 7-9 8-10, three tenths 0-4 3-7 6-10."""
    sources, before = Mixture([0.7, 0.3]).sources(0, 13)
    assert sources.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    assert before.tolist() == [0, 1, 0, 2, 3, 1, 4, 5, 6, 2, 7, 8, 3]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_each_share_up_or_down(weights: list[float]) -> None:
    mixture = Mixture(weights)
    shares = [Fraction(part, int(mixture.parts.sum())) for part in mixture.parts.tolist()]
    for wanted, share in zip(weights, mixture.shares, strict=True):
        assert share == pytest.approx(wanted / sum(weights), abs=1e-5)
    drawn = [0] * len(weights)
    sources, before = mixture.sources(0, 25_000)
    for count, (source, number) in enumerate(zip(sources.tolist(), before.tolist(), strict=True), start=1):
        assert number == drawn[source]
        drawn[source] += 1
        share = shares[source]
        assert math.floor(count * share) <= drawn[source] <= math.ceil(count * share)
        if count % 997 == 0:
            for part, number in zip(shares, drawn, strict=True):
                assert math.floor(count * part) <= number <= math.ceil(count * part)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_place_is_found_at_once(weights: list[float]) -> None:
    mixture = Mixture(weights)
    sources, before = mixture.sources(0, 5000)
    later = mixture.sources(1234, 1000)
    assert later[0].tolist() == sources[1234:2234].tolist()
    assert later[1].tolist() == before[1234:2234].tolist()
    for source in range(len(weights)):
        own = np.flatnonzero(sources == source)
        assert mixture.draws(source, len(own)).tolist() == own.tolist()
    far, given = mixture.sources(10**12, 20)
    for place, source, number in zip(range(10**12, 10**12 + 20), far.tolist(), given.tolist(), strict=True):
        assert abs(number - place * mixture.shares[source]) < 1.01  # shares are rounded to doubles


def test_only_ratios_of_weights_matter() -> None:
    for weights in ([70, 30], [2.1, 0.9]):
        assert Mixture(weights).sources(5, 50)[0].tolist() == Mixture([0.7, 0.3]).sources(5, 50)[0].tolist()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_none(weight: float) -> None:
    with pytest.raises(HvdlmError, match=r"a weight of .*: give a number above 0"):
        Mixture([0.5, weight])


def test_a_share_that_is_too_small() -> None:
    with pytest.raises(HvdlmError, match=r"a weight of 1e-06 is less than a part in 100,000 of all weights"):
        Mixture([1e-6, 1.0])


SHARDS = [[5, 1], [7, 3, 40], [2]]  # windows
SHARES = [2, 5, 3]


def pairs(sampler: MixtureSampler, k: int) -> list[tuple[int, int]]:
    shards, windows = sampler.batch(k)
    return list(zip(shards.tolist(), windows.tolist(), strict=True))


def source_of(shard: int) -> int:
    return [0, 0, 1, 1, 1, 2][shard]


RAMP = BatchSizes(16, increment=4, increments=3, steps=7)  # batches of 4, 4, 4, 8, 8, 12, 12, then 16


@pytest.mark.parametrize(
    ("batch_sizes", "sizes"),
    [
        (BatchSizes(1), [1] * 400),
        (BatchSizes(3), [3] * 133),
        (BatchSizes(16), [16] * 25),
        (RAMP, [4, 4, 4, 8, 8, 12, 12, *[16] * 21]),
    ],
)
def test_agrees_with_an_independent_implementation(batch_sizes: BatchSizes, sizes: list[int]) -> None:
    """One sequence at a time with Python's integers: the source by its share, then a permutation of its windows."""
    tasks = sorted(
        (-(-(number + 1) * 10 // share), source, number * 10 // share)  # deadline, source, release
        for source, share in enumerate(SHARES)
        for number in range(40 * share)
    )
    order: list[int] = []
    while tasks:
        chosen = next(task for task in tasks if task[2] <= len(order))
        tasks.remove(chosen)
        order.append(chosen[1])
    sampler = MixtureSampler(SHARDS, Mixture(SHARES), batch_sizes, 3, "f")
    starts = [0, 2, 5]
    for k in range(len(sizes)):
        batch: list[list[tuple[int, int]]] = [[], [], []]
        places = range(sum(sizes[:k]), sum(sizes[: k + 1]))
        for place in places:
            source = order[place]
            own = [(starts[source] + shard, w) for shard, count in enumerate(SHARDS[source]) for w in range(count)]
            epoch, value = divmod(order[:place].count(source), len(own))
            digest = hashlib.shake_256(f"f 3 {source} {epoch}".encode()).digest(8 * ROUNDS)
            keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
            a = math.isqrt(len(own) - 1) + 1
            b = -(-len(own) // a)
            value = network(value, a, b, keys)
            while value >= len(own):
                value = network(value, a, b, keys)
            batch[source].append(own[value])
        rest = [iter(sorted(each)) for each in batch]
        assert pairs(sampler, k) == [next(rest[order[place]]) for place in places]


@pytest.mark.parametrize("batch_size", [1, 6, 16])
def test_batches_have_each_share_and_each_source_its_own_epochs(batch_size: int) -> None:
    sampler = MixtureSampler(SHARDS, Mixture(SHARES), BatchSizes(batch_size), 0, "f")
    drawn: list[list[tuple[int, int]]] = [[], [], []]
    for k in range(1600 // batch_size):
        for pair in pairs(sampler, k):
            drawn[source_of(pair[0])].append(pair)
        for share, own in zip(SHARES, drawn, strict=True):
            assert abs(len(own) - (k + 1) * batch_size * share / 10) < 1
    if batch_size == 1:  # in larger batches windows are sorted, across the end of an epoch too
        for own, size in zip(drawn, (6, 50, 2), strict=True):
            epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
            assert len(epochs) > 5
            assert all(len(set(epoch)) == size for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_part_of_every_rank_is_a_mixture(size: int) -> None:
    sampler = MixtureSampler([[10_000], [3000]], Mixture([3, 1]), BatchSizes(48), 0, "f")
    for k in range(20):
        batch = pairs(sampler, k)
        assert len(set(batch)) == 48
        for rank in range(size):
            own = [batch[index] for index in rank_part(48, rank, size)]
            assert abs(sum(shard == 0 for shard, _ in own) - 0.75 * len(own)) < 2


def two_sources(folder: Path) -> tuple[list[str], list[str]]:
    code, wiki = make_texts(300), make_texts(100, seed=1)
    wiki = [f"wiki {text}" for text in wiki]
    write_lines(folder / "code.jsonl", code)
    (folder / "wiki").mkdir()
    write_lines(folder / "wiki" / "a.jsonl", wiki[:50])
    write_lines(folder / "wiki" / "b.jsonl.gz", wiki[50:])
    return code, wiki


def prepare(folder: Path, *words: str, output: str = "out") -> str:
    done = hvdlm("prepare", *words, "--output", output, "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


MIX = ("--mix", "0.7=code.jsonl", "0.3=wiki", "--shards", "2", "--validation", "0.2")


def test_sources_have_shards_of_their_own(tmp_path: Path) -> None:
    code, wiki = two_sources(tmp_path)
    prepare(tmp_path, *MIX)
    documents = stored_documents(tmp_path / "out")
    names = ["shard_00000.h5", "shard_00001.h5", "val/shard_00000.h5"], ["shard_00002.h5", "shard_00003.h5"]
    own = [[text for name in names[0] for text in documents[name]]]
    own.append([text for name in (*names[1], "val/shard_00001.h5") for text in documents[name]])
    assert sorted(own[0]) == sorted(code)
    assert sorted(own[1]) == sorted(wiki)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.version == 2
    assert [(each.path, each.weight, each.shards) for each in manifest.sources] == [
        ("code.jsonl", 0.7, 2),
        ("wiki", 0.3, 2),
    ]
    inspected = hvdlm("inspect", "out", "--verify", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    tokens = sum(len(text.encode()) + 1 for name in names[1] for text in documents[name])
    (row,) = [line.split() for line in inspected.stdout.splitlines() if line.split()[:1] == ["wiki"]]
    assert row[1:5] == ["0.3", "30.00%", "2", f"{tokens:,}"]
    assert row[5] == f"{tokens / 0.3:,.0f}"


def test_a_data_set_without_weights_is_what_it_was(tmp_path: Path) -> None:
    """Its manifest has no word of sources, and its order is that of `Sampler`, as before there were weights."""
    two_sources(tmp_path)
    prepare(tmp_path, "--input", "code.jsonl", "wiki", "--shards", "2")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["version"] == 1
    assert "sources" not in content
    assert "mixture" not in content["recipe"]
    data = DataSet(tmp_path / "out")
    before = Sampler([(shard.n_tokens - 1) // 16 for shard in data.train.shards], BatchSizes(8), 5, data.fingerprint)
    now = training_sampler(data, 16, BatchSizes(8), 5)
    assert all(np.array_equal(now.batch(k), before.batch(k)) for k in (0, 7, 1000))


def test_weights_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    two_sources(tmp_path)
    prepare(tmp_path, *MIX)
    prepare(tmp_path, "--mix", "0.6=code.jsonl", "0.4=wiki", *MIX[3:], output="other")
    out, other = contents(tmp_path / "out"), contents(tmp_path / "other")
    assert {name for name in out if out[name] != other[name]} == {"manifest.json"}
    assert DataSet(tmp_path / "out").fingerprint != DataSet(tmp_path / "other").fingerprint
    assert "is there already" in prepare(tmp_path, *MIX)
    refused = hvdlm("prepare", "--mix", "1=code.jsonl", "2=wiki", *MIX[3:], "--output", "out", cwd=tmp_path)
    sentence = "made with another mixture (there 0.7=code.jsonl 0.3=wiki, here 1=code.jsonl 2=wiki)"
    assert sentence in refused.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_ranks_share_the_batches_and_any_of_them_is_a_start(size: int, tmp_path: Path) -> None:
    two_sources(tmp_path)
    prepare(tmp_path, *MIX)
    data = DataSet(tmp_path / "out")
    sampler = training_sampler(data, 16, BatchSizes(8), 5)
    for k in (0, 1000):
        rows = []
        for rank in range(size):
            with Loader(data, 16, RankParts(BatchSizes(8), size), 5, rank, read_ahead=1, start=k) as loader:
                rows += loader.next().inputs.tolist()
        shards, windows = sampler.batch(k)
        expected = [
            data.train.read(shard, window * 16, 16).tolist()
            for shard, window in zip(shards.tolist(), windows.tolist(), strict=True)
        ]
        assert rows == expected


def test_the_first_sequences_of_validation_are_a_mixture_and_all_are_there_once(tmp_path: Path) -> None:
    two_sources(tmp_path)
    prepare(tmp_path, *MIX)
    data = DataSet(tmp_path / "out")
    starts = {
        tuple(data.validation.read(shard, start, 64).tolist()): shard
        for shard, info in enumerate(data.validation.shards)
        for start in range(0, info.n_tokens - 64, 64)
    }

    def drawn(limit: int) -> list[int | None]:
        batches = [validation_batches(data, 64, 4, rank, 3, limit) for rank in range(3)]
        return [starts.get(tuple(row)) for batch in itertools.chain(*batches) for row in batch.inputs.tolist()]

    for limit in (1, 7, 20, 50):
        assert abs(sum(shard == 1 for shard in drawn(limit)) - 0.3 * limit) < 1
    counts = Counter(drawn(0))
    assert sum(counts.values()) == sum(-(-(info.n_tokens - 1) // 64) for info in data.validation.shards)
    assert set(Counter(starts.values()).items()) <= set(counts.items())  # beside the last ones, which are filled up


def test_files_for_validation_beside_a_mixture(tmp_path: Path) -> None:
    code, wiki = two_sources(tmp_path)
    prepare(tmp_path, *MIX[:5], "--validation-input", "wiki/a.jsonl")
    documents = stored_documents(tmp_path / "out")
    assert documents["val/shard_00000.h5"] == wiki[:50]
    assert "val/shard_00001.h5" not in documents
    assert sorted(documents["shard_00000.h5"] + documents["shard_00001.h5"]) == sorted(code)
    assert sorted(documents["shard_00002.h5"] + documents["shard_00003.h5"]) == sorted(wiki[50:])
    assert sum(len(batch.inputs) for batch in validation_batches(DataSet(tmp_path / "out"), 16, 4, 0, 1)) > 50


def test_a_source_may_be_one_document(tmp_path: Path) -> None:
    code, _ = two_sources(tmp_path)
    (tmp_path / "book.txt").write_text("\n".join(code))
    said = prepare(tmp_path, "--mix", "1=wiki", "1=book.txt", *MIX[3:])
    assert "book.txt is one document: its last 20.0% are validation" in said
    documents = stored_documents(tmp_path / "out")
    parts = [documents[name] for name in ("shard_00002.h5", "shard_00003.h5", "val/shard_00001.h5")]
    assert "".join(text for part in parts for text in part) == "\n".join(code)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_workers_do_not_change_a_byte(tokenizer: str, tmp_path: Path) -> None:
    two_sources(tmp_path)
    prepare(tmp_path, *MIX, "--tokenizer", tokenizer)
    done = hvdlm("prepare", *MIX, "--tokenizer", tokenizer, "--output", "two", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--mix", "0=code.jsonl"], 2, "argument --mix: '0=code.jsonl': the weight must be above 0"),
        (["--mix=-1=code.jsonl"], 2, "argument --mix: '-1=code.jsonl': the weight must be above 0"),
        (["--mix", "nan=code.jsonl"], 2, "argument --mix: 'nan' is not a finite number"),
        (["--mix", "code.jsonl"], 2, "argument --mix: 'code.jsonl': give WEIGHT=PATH, as 0.7=texts/code"),
        (["--mix", "1="], 2, "argument --mix: it is empty: give a path"),
        (["--mix", "1=wiki", "--input", "code.jsonl"], 2, "argument --input: not allowed with argument --mix"),
        (["--mix", "1=wiki", "2=wiki"], 1, "--mix names wiki twice: give it once, with one weight"),
        (["--mix", "1=wiki", "1=wiki/a.jsonl"], 1, "a.jsonl belongs to --mix 1=wiki and --mix 1=wiki/a.jsonl"),
        (["--mix", "1=wiki", "1=none"], 1, "--mix none: no such file, directory or glob match; check the path"),
        (["--mix", "1=wiki", "1=empty"], 1, "--mix 1=empty holds no documents; check it"),
        (
            ["--mix", "1=wiki", "1=one.jsonl"],
            1,
            "--mix 1=one.jsonl: 1 document is too few: 2 of 3 shards (validation included) got none",
        ),
        (["--mix", "1=wiki", "1e-9=code.jsonl"], 1, "a weight of 1e-09 is less than a part in 100,000 of all weights"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_a_sentence(
    words: list[str], status: int, sentence: str, tmp_path: Path
) -> None:
    two_sources(tmp_path)
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "one.jsonl", ["alone"])
    done = hvdlm("prepare", *words, *MIX[3:], "--output", "out", "--workers", "1", cwd=tmp_path)
    assert done.returncode == status
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_whole_sequence_is_named(tmp_path: Path) -> None:
    two_sources(tmp_path)
    write_lines(tmp_path / "few.jsonl", ["abc", "defg", "hi", "jkl"])
    prepare(tmp_path, "--mix", "1=code.jsonl", "1=few.jsonl", "--shards", "1", "--validation", "0")
    with pytest.raises(HvdlmError, match=r"shards of few\.jsonl in .*out hold no whole sequence; shorten model\.cont"):
        training_sampler(DataSet(tmp_path / "out"), 64, BatchSizes(8), 5)
