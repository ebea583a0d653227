"""Poisson sampling: independent of ranks and start, each unit with the same chance; documents as sequences."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats
from torch import Tensor

from hvdlm.data.loader import Loader
from hvdlm.data.poisson import PoissonBatches, Unit, units_of
from hvdlm.data.prepare import prepare
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.shard import DataSet
from hvdlm.targets import IGNORE

LENGTH = 8
END = 256  # of text, in a data set of bytes


def batches(units: int = 500, expected: int = 20, key: str = "k", unit: Unit = "sequence") -> PoissonBatches:
    return PoissonBatches(key, unit, units, expected)


def test_each_unit_is_drawn_on_its_own() -> None:
    """Counts of units, of pairs of neighbours and of batches' sizes are those of independent draws."""
    count, rate = 4000, 20 / 500
    drawn = np.zeros((count, 500), dtype=np.int64)
    for index in range(count):
        numbers = batches().drawn(index)
        assert (np.diff(numbers) > 0).all()
        drawn[index, numbers] = 1
    deviation = (count * rate * (1 - rate)) ** 0.5
    scores = (drawn.sum(axis=0) - count * rate) / deviation
    assert abs(scores).max() < 5 and abs(scores.std() - 1) < 0.15
    pairs = (drawn[:, 1:] & drawn[:, :-1]).sum()
    expected = count * 499 * rate**2
    assert abs(pairs - expected) < 5 * expected**0.5
    sizes = drawn.sum(axis=1)
    observed = np.bincount(sizes.clip(10, 30), minlength=31)[10:]
    chances = stats.binom.pmf(range(10, 31), 500, rate)
    chances[0], chances[-1] = stats.binom.cdf(10, 500, rate), stats.binom.sf(29, 500, rate)
    assert stats.chisquare(observed, count * chances).pvalue > 0.001


def test_edges() -> None:
    assert batches(expected=500).drawn(3).tolist() == list(range(500))
    assert {batches(units=3, expected=1).size(index) for index in range(50)} == {0, 1, 2, 3}
    assert batches(key="a").drawn(0).tolist() != batches(key="b").drawn(0).tolist()
    assert batches(units=10**9, expected=2000).size(0) > 1500


def test_fixed_parts_do_not_depend_on_what_another_rank_has() -> None:
    """They are those of units by number; together they are the batch."""
    fixed = PoissonBatches("k", "sequence", 500, 20, fixed_parts=True)
    for index in range(20):
        drawn = fixed.drawn(index)
        assert drawn.tolist() == batches().drawn(index).tolist()
        own = [RankParts(fixed, 3).own(index, rank) for rank in range(3)]
        assert [place for part in own for _, place in part] == list(range(len(drawn)))
        for rank, part in enumerate(own):
            bounds = range(rank * 500 // 3, (rank + 1) * 500 // 3)
            assert [drawn[place] for _, place in part] == [number for number in drawn if number in bounds]


@pytest.mark.parametrize("fixed_parts", [False, True])
def test_ranks_that_are_left_have_the_batch_of_a_step_that_is_made_again(fixed_parts: bool) -> None:
    own = PoissonBatches("k", "sequence", 500, 20, fixed_parts=fixed_parts)
    parts, lost = RankParts(own, 3).regrouped([0, 2], sent=5, batch=5, end=100)
    assert lost == 0
    for index in range(5, 15):
        together = [each for rank in (0, 2) for each in parts.own(index, rank)]
        assert together == [(index, place) for place in range(own.size(index))] and parts.own(index, 1) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    path = tmp_path_factory.mktemp("poisson")
    generator = random.Random(0)
    for number in range(40):
        text = f"{number:02}" + "".join(generator.choices("abcdefgh", k=generator.choice([0, 3, 5, 6, 20, 40])))
        (path / f"{number:02}.txt").write_text(text)
    prepare(
        inputs=[str(path / "*.txt")],
        output=path / "data",
        tokenizer="byte",
        shards=3,
        validation=0.1,
        workers=1,
        text_key="text",
        seed=0,
        skip_bad=False,
    )
    return DataSet(path / "data")


def read(data: DataSet, unit: Unit, rank: int, size: int, start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    own = batches(units_of(data.train, LENGTH, unit), 6, unit=unit)
    with Loader(data, LENGTH, RankParts(own, size), 5, rank, read_ahead=2, start=start) as loader:
        read = [loader.next() for _ in range(count)]
    return [(batch.inputs, batch.targets) for batch in read]


@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_batches_are_the_same_on_any_number_of_ranks_and_from_any_start(data: DataSet, unit: Unit) -> None:
    whole = read(data, unit, 0, 1, 0, 12)
    assert len({len(inputs) for inputs, _ in whole}) > 3
    for size, start in ((2, 0), (3, 5), (7, 2)):
        parts = [read(data, unit, rank, size, start, 12 - start) for rank in range(size)]
        assert size < 7 or any(len(inputs) == 0 for part in parts for inputs, _ in part)
        for index, (inputs, targets) in enumerate(whole[start:]):
            own = [part[index] for part in parts]
            assert [row.tolist() for part, _ in own for row in part] == inputs.tolist()
            assert [row.tolist() for _, part in own for row in part] == targets.tolist()


def test_sequences_are_those_of_a_run_without_privacy(data: DataSet) -> None:
    tokens = [np.concatenate([block.astype(int) for block in data.train.blocks(shard)]) for shard in range(3)]
    possible = {
        tuple(each[start : start + LENGTH + 1]) for each in tokens for start in range(0, len(each) - LENGTH, LENGTH)
    }
    assert units_of(data.train, LENGTH, "sequence") == sum((len(each) - 1) // LENGTH for each in tokens)
    for inputs, targets in read(data, "sequence", 0, 1, 0, 12):
        for row, next_tokens in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert (*row, next_tokens[-1]) in possible and row[1:] == next_tokens[:-1]


def test_a_document_is_a_sequence_of_its_own(data: DataSet) -> None:
    """Each target is the token after what the inputs say; a long document is there in parts, all of which come up."""
    documents = {}  # with the end of text before and after, by the two digits that each begins with
    for shard in range(3):
        tokens = np.concatenate([block.astype(int) for block in data.train.blocks(shard)]).tolist()
        offsets = data.train.document_offsets(shard).astype(int).tolist()
        for start, end in itertools.pairwise(offsets):
            documents[tuple(tokens[start : start + 2])] = [END, *tokens[start:end]]
    assert units_of(data.train, LENGTH, "document") == len(documents)
    assert all(each[-1] == END for each in documents.values())
    parts = {
        (tuple(each[start:-1][:LENGTH]), tuple(each[start + 1 :][:LENGTH]))
        for each in documents.values()
        for start in range(0, len(each) - 1, LENGTH)
    }
    found = set()
    for inputs, targets in read(data, "document", 0, 1, 0, 600):
        for row, next_tokens in zip(inputs.tolist(), targets.tolist(), strict=True):
            count = sum(token != IGNORE for token in next_tokens)
            assert next_tokens[count:] == [IGNORE] * (LENGTH - count) and row[count:] == [END] * (LENGTH - count)
            found.add((tuple(row[:count]), tuple(next_tokens[:count])))
    assert found == parts
