"""Validation against plain PyTorch over every token, on any number of ranks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from thread_rank import on_threads
from torch.nn import functional

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import ModelSection
from hvdlm.data.mixture import WeightedPath
from hvdlm.data.prepare import prepare
from hvdlm.data.shard import DataSet
from hvdlm.errors import JobError
from hvdlm.model.transformer import Transformer
from hvdlm.training.evaluation import Evaluation, evaluate

LENGTH = 16


def make_data(directory: Path, validation: float) -> Path:
    generator = random.Random(0)
    for i in range(40):
        text = "".join(generator.choices("abcdé ", weights=(9, 5, 3, 2, 2, 4), k=generator.randint(5, 60)))
        (directory / f"{i:02}.txt").write_text(f"{i} {text}", encoding="utf-8")
    prepare(
        inputs=[str(directory / "*.txt")],
        output=directory / "data",
        tokenizer="byte",
        shards=2,
        validation=validation,
        workers=1,
        text_key="text",
        seed=0,
        skip_bad=False,
    )
    return directory / "data"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("evaluation"), validation=0.3)


def make_model(data: DataSet, **changes: Any) -> Transformer:
    model = Transformer(
        ModelSection(layers=2, heads=2, width=16, context_length=LENGTH, **changes), vocab_size=data.vocab_size
    )
    model.initialise(3)
    with torch.no_grad():  # weights large enough that tokens differ in their loss
        for parameter in model.parameters():
            parameter.mul_(8)
        # and a taste for the commonest token, so that it is sometimes right
        model.final_norm.bias += 24 * model.output_weight[validation_tokens(data.path).mode().values]
    return model


@dataclass
class ByHand:
    loss_sum: float
    correct: int
    tokens: int


def validation_tokens(path: Path, shard: int = 0) -> torch.Tensor:
    """A validation shard, whole, or one token if there is none."""
    if not (path / "val").exists():
        return torch.zeros(1, dtype=torch.int64)
    with h5py.File(path / "val" / f"shard_{shard:05d}.h5", locking=False) as file:
        return torch.from_numpy(file["tokens"][:].astype("int64"))


def by_hand(model: Transformer, path: Path, windows: int | None = None, shard: int = 0) -> ByHand:
    """One window after another, the last one as short as it is: logits, then PyTorch's own cross entropy."""
    tokens = validation_tokens(path, shard)
    result = ByHand(0.0, 0, 0)
    model.eval()
    for start in list(range(0, len(tokens) - 1, LENGTH))[:windows]:
        window = tokens[start : start + LENGTH + 1]
        with torch.no_grad():
            logits = model.logits(model(window[None, :-1]))[0].double()
        result.loss_sum += float(functional.cross_entropy(logits, window[1:], reduction="sum"))
        result.correct += int((logits.argmax(dim=1) == window[1:]).sum())
        result.tokens += len(window) - 1
    return result


def check(result: Evaluation, expected: ByHand) -> None:
    assert result.tokens == expected.tokens
    assert result.loss == pytest.approx(expected.loss_sum / expected.tokens, rel=1e-6)
    assert result.accuracy == expected.correct / expected.tokens
    assert result.perplexity == pytest.approx(math.exp(expected.loss_sum / expected.tokens), rel=1e-5)


def test_every_token_but_the_first_is_predicted_once(path: Path) -> None:
    data = DataSet(path)
    model = make_model(data)
    expected = by_hand(model, path)
    assert expected.tokens == len(validation_tokens(path)) - 1
    assert expected.tokens % LENGTH  # so that the last window is a short one
    assert 0 < expected.correct < expected.tokens
    for at_once in (1, 3, 1000):
        check(evaluate(model, data, SoloCommunicator(), at_once), expected)


def test_bits_per_byte_count_the_bytes_of_the_text(path: Path) -> None:
    data = DataSet(path)
    tokens = validation_tokens(path)
    text_bytes = int((tokens != data.eos_id).sum())  # the byte tokenizer has one token a byte, and the ends of text
    result = evaluate(make_model(data), data, SoloCommunicator(), 4)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * len(tokens) / text_bytes)
    assert Evaluation(loss=2.0, accuracy=0.5, tokens=10, tokens_per_byte=1.5).perplexity == math.exp(2.0)


@pytest.mark.parametrize("limit", [1, 7])
def test_a_limit_takes_the_first_sequences(path: Path, limit: int) -> None:
    data = DataSet(path)
    model = make_model(data)
    expected = by_hand(model, path, limit)
    assert expected.tokens == limit * LENGTH
    for at_once in (1, 4):
        check(evaluate(model, data, SoloCommunicator(), at_once, limit), expected)


def test_a_limit_beyond_the_end_is_none(path: Path) -> None:
    data = DataSet(path)
    model = make_model(data)
    unlimited = evaluate(model, data, SoloCommunicator(), 4)
    assert evaluate(model, data, SoloCommunicator(), 4, limit=10**6) == unlimited


def evaluate_on(ranks: int, path: Path, limit: int = 0) -> list[Evaluation]:
    def run(communicator: Communicator) -> Evaluation:
        data = DataSet(path)
        return evaluate(make_model(data), data, communicator, 2, limit)

    return on_threads(ranks, run)


@pytest.mark.parametrize(("ranks", "limit"), [(2, 0), (3, 0), (5, 7), (4, 2)])  # the last leaves ranks without any
def test_all_ranks_return_the_same_however_many_there_are(path: Path, ranks: int, limit: int) -> None:
    data = DataSet(path)
    alone = evaluate(make_model(data), data, SoloCommunicator(), 2, limit)
    results = evaluate_on(ranks, path, limit)
    assert len(set(results)) == 1
    assert (results[0].tokens, results[0].accuracy) == (alone.tokens, alone.accuracy)
    assert results[0].loss == pytest.approx(alone.loss, rel=1e-6)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A data set of three sources of unlike lengths, and their paths."""
    folder, draw = tmp_path_factory.mktemp("mixture"), random.Random(1)
    mix = []
    for weight, letters, count in ((3, "abcd", 4000), (1, "é0123", 900), (2, "xyz ", 60)):
        name = folder / f"{letters[0]}.txt"
        name.write_text("".join(draw.choice(letters) for _ in range(count)), encoding="utf-8")
        mix.append(WeightedPath(weight, str(name)))
    prepare([], folder / "data", "byte", 1, 0.2, 1, "text", 0, skip_bad=False, mix=mix)
    return folder / "data", [each.path for each in mix]


@pytest.mark.parametrize(("ranks", "at_once"), [(1, 1), (1, 1000), (2, 5), (3, 4)])
def test_each_source_has_a_loss(mixture: tuple[Path, list[str]], ranks: int, at_once: int) -> None:
    """Of its own shard alone, though micro-batches hold sequences of several; all sources together are the whole."""
    path, names = mixture
    model = make_model(DataSet(path))
    expected = [by_hand(model, path, shard=shard) for shard in range(3)]
    assert len({each.tokens for each in expected}) == 3
    all_results = on_threads(
        ranks, lambda communicator: evaluate(make_model(DataSet(path)), DataSet(path), communicator, at_once)
    )
    for result in all_results:
        assert list(result.of_sources) == names
        for own, one, shard in zip(result.of_sources.values(), expected, range(3), strict=True):
            check(own, one)
            assert own.of_sources == {}
            tokens = validation_tokens(path, shard)
            n_bytes = int((tokens != DataSet(path).eos_id).sum())
            assert own.bits_per_byte == pytest.approx(own.loss / math.log(2) * len(tokens) / n_bytes)
        sums = ([each.loss_sum for each in expected], [each.correct for each in expected])
        check(result, ByHand(*map(sum, sums), sum(each.tokens for each in expected)))
    assert all(result == all_results[0] for result in all_results)


def test_a_source_without_a_sequence_among_the_first_is_left_out(mixture: tuple[Path, list[str]]) -> None:
    """Weights 3, 1 and 2: the first two sequences, due by 2, 3 and 6, are of the first source and the last."""
    path, names = mixture
    result = evaluate(make_model(DataSet(path)), DataSet(path), SoloCommunicator(), 4, limit=2)
    assert list(result.of_sources) == [names[0], names[2]]
    assert result.tokens == sum(each.tokens for each in result.of_sources.values())


def test_sources_with_one_validation_for_all_have_no_loss_each(tmp_path: Path) -> None:
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text " * 50)
    mix = [WeightedPath(1, str(tmp_path / f"{name}.txt")) for name in ("a", "b")]
    held_out = [str(tmp_path / "held.txt")]
    prepare([], tmp_path / "data", "byte", 1, 0, 1, "text", 0, skip_bad=False, mix=mix, validation_inputs=held_out)
    data = DataSet(tmp_path / "data")
    assert evaluate(make_model(data), data, SoloCommunicator(), 4).of_sources == {}


def test_lower_precision_is_close_and_not_the_same(path: Path) -> None:
    data = DataSet(path)
    model = make_model(data)
    full = evaluate(model, data, SoloCommunicator(), 4)
    model.set_compute_dtype(torch.bfloat16)
    low = evaluate(model, data, SoloCommunicator(), 4)
    assert low.loss == pytest.approx(full.loss, rel=0.05)
    assert low.loss != full.loss


def test_dropout_is_off_meanwhile_and_training_goes_on_after(path: Path) -> None:
    data = DataSet(path)
    model = make_model(data, dropout=0.5)
    expected = by_hand(model, path)
    model.train()
    check(evaluate(model, data, SoloCommunicator(), 4), expected)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    evaluate(model, data, SoloCommunicator(), 4, limit=1)
    assert not model.training


def test_documents_are_masked_if_the_model_was_trained_so(path: Path) -> None:
    data = DataSet(path)
    masked = make_model(data, document_mask=True)
    tokens, eos = validation_tokens(path), data.eos_id
    loss = 0.0
    masked.eval()
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, LENGTH):
            window = tokens[start : start + LENGTH + 1]
            ids = [int((window[:place] == eos).sum()) for place in range(len(window) - 1)]  # ends of text before it
            hidden = masked(window[None, :-1], torch.tensor([ids]))
            loss += float(functional.cross_entropy(masked.logits(hidden)[0], window[1:], reduction="sum"))
    result = evaluate(masked, data, SoloCommunicator(), 4)
    assert result.loss == pytest.approx(loss / (len(tokens) - 1), rel=1e-6)
    assert abs(result.loss / evaluate(make_model(data), data, SoloCommunicator(), 4).loss - 1) > 1e-4


def test_a_data_set_without_validation_is_refused(tmp_path: Path) -> None:
    path = make_data(tmp_path, validation=0)
    data = DataSet(path)
    with pytest.raises(JobError) as caught:
        evaluate(make_model(data), data, SoloCommunicator(), 4)
    assert str(caught.value) == f"{path} has no validation tokens: prepare it with a larger --validation"


def test_a_shard_that_was_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    path = make_data(tmp_path, validation=0.3)
    data = DataSet(path)
    shard = path / "val" / "shard_00000.h5"
    with h5py.File(shard) as file:
        place = file["tokens"].id.get_chunk_info(0).byte_offset
    model = make_model(data)
    content = bytearray(shard.read_bytes())
    content[place + 10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(JobError, match=r"shard_00000\.h5 cannot be read at chunk 0"):
        evaluate(model, data, SoloCommunicator(), 4)


class Counting(SoloCommunicator):
    """Counts how often ranks would have met."""

    meetings = 0

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> torch.Tensor:
        self.meetings += 1
        return super().all_reduce_(tensor, op)


def test_ranks_meet_after_each_micro_batch(path: Path) -> None:
    """So that a rank need not wait longer than for one, however many there are."""
    data, communicator = DataSet(path), Counting()
    evaluate(make_model(data), data, communicator, 2, limit=7)
    assert communicator.meetings == 4 + 1  # 2 + 2 + 2 + 1 sequences, and that there are no more


@pytest.mark.parametrize("asked", [1, 3])
def test_it_stops_on_all_ranks_when_one_is_asked_to(path: Path, asked: int) -> None:
    def run(communicator: Communicator) -> Evaluation | None:
        data, batches = DataSet(path), iter(range(100))
        is_asked = communicator.rank == 1
        return evaluate(make_model(data), data, communicator, 2, 0, lambda: is_asked and next(batches) >= asked)

    assert on_threads(2, run) == [None, None]
