"""Validation gives the figures of plain PyTorch, to the last digit that is printed, on any number of ranks."""

from __future__ import annotations

import math
import re
from pathlib import Path

import commands
import h5py
import pytest
import torch
from jobs import Ranks
from pool import Pools
from torch.nn import functional

from hvdlm.config import Config
from hvdlm.data.prepare import prepare
from hvdlm.data.shard import DataSet
from hvdlm.model.transformer import Transformer
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.samples import held_out_texts


@pytest.fixture(scope="module")
def data(small_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packages; a few of their files are for validation."""
    output = tmp_path_factory.mktemp("data") / "tiny"
    prepare(small_texts[1:4], output, "byte", 2, 0.2, workers=1, text_key="text", seed=0, skip_bad=True)
    return output


@pytest.fixture(scope="module")
def run_dir(data: Path, pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one short training."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    result = Ranks(pools.get("mpi", "mpirun", 4)).train(2, data, run_dir, train__global_batch_size=6)
    assert result.status == 0, result.output
    return run_dir


@pytest.fixture(scope="module")
def expected(run_dir: Path, data: Path) -> tuple[float, float, int]:
    """Loss in nats per token, share of tokens guessed right and number of tokens, by PyTorch alone.

    Every token of the validation shards but their first is predicted once, in windows that begin every
    `context_length` tokens.
    """
    state = checkpoint.open_state(run_dir)
    config = Config.model_validate(state["config"]).model
    model = Transformer(config, state["vocab_size"])
    model.load_state_dict(Checkpoint(Path(state["path"])).model())
    model.eval()
    loss, right, count = 0.0, 0, 0
    files = sorted((data / "val").glob("*.h5"))
    assert files
    for file in files:
        with h5py.File(file) as shard:
            tokens = torch.from_numpy(shard["tokens"][:].astype("int64"))
        for start in range(0, len(tokens) - 1, config.context_length):
            window = tokens[start : start + config.context_length + 1]
            with torch.no_grad():
                logits = functional.linear(model(window[None, :-1])[0], model.output_weight)  # (T, V)
            loss += float(functional.cross_entropy(logits, window[1:], reduction="sum"))
            right += int((logits.argmax(-1) == window[1:]).sum())
            count += len(window) - 1
    assert count > 1000 and count % config.context_length  # the last window is a short one
    return loss / count, right / count, count


@pytest.mark.parametrize("at_once", [3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_figures(
    size: int, at_once: int, ranks: Ranks, run_dir: Path, data: Path, expected: tuple[float, float, int]
) -> None:
    options = {"run_dir": run_dir, "data_path": data, "at_once": at_once}
    for answer in ranks.pool.run(Path(commands.__file__), "evaluate_checkpoint", size, **options):
        loss, accuracy, tokens = answer.value
        assert loss == pytest.approx(expected[0], rel=0, abs=1e-6)
        assert accuracy == pytest.approx(expected[1], rel=0, abs=2 / tokens)  # two words may be as likely
        assert tokens == expected[2]


def test_printed_figures(ranks: Ranks, run_dir: Path, data: Path, expected: tuple[float, float, int]) -> None:
    """And the table shows the n-gram models beside the trained model, the same on any number of ranks."""
    loss, accuracy, tokens = expected
    shards = DataSet(data).validation.shards
    bits = loss / math.log(2) * sum(shard.n_tokens for shard in shards) / sum(shard.n_bytes for shard in shards)
    cells = r"(\d-gram|model) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]*)"
    tables = []
    for size in (1, 3):
        result = ranks.hvdlm(size, "evaluate", str(run_dir), "--data", str(data))
        assert result.status == 0, result.output
        assert f"{tokens:,} tokens" in " ".join(result.output.split())
        tables.append(re.findall(cells, result.output))
    assert tables[0] == tables[1]
    assert [row[0].split()[0] for row in tables[0]] == [*(f"{n}-gram" for n in range(1, 6)), "model"]
    printed = [float(number) for number in tables[0][-1][1:]]
    assert printed == pytest.approx([loss, math.exp(loss), bits, 100 * accuracy], rel=0, abs=0.006)
    assert printed[0] == pytest.approx(loss, rel=0, abs=5.1e-5)


def test_samples(ranks: Ranks, run_dir: Path, data: Path) -> None:
    """The same table on any number of ranks; another seed draws other texts."""
    tables = []
    for size, at_once, seed in ((1, 8, 0), (2, 3, 0), (3, 8, 1)):
        words = ("--samples", "7", "--micro-batch-size", str(at_once), "--seed", str(seed))
        result = ranks.hvdlm(size, "evaluate", str(run_dir), "--data", str(data), *words)
        assert result.status == 0, result.output
        tables.append(result.output[result.output.index("7 continuations") :])
    assert tables[0] == tables[1] != tables[2]
    for name in ("distinct-1", "distinct-4", "repeated 4-grams", "vocabulary", "ROUGE-1", "ROUGE-2", "ROUGE-L"):
        assert tables[0].count(f"│ {name} ") == 1


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [("-1", "--samples -1: give 1 or more, or 0"), ("99999", "has only [0-9]+ texts of 32 tokens")],
)
def test_samples_that_are_not_there(samples: str, sentence: str, ranks: Ranks, run_dir: Path, data: Path) -> None:
    result = ranks.hvdlm(2, "evaluate", str(run_dir), "--data", str(data), "--samples", samples)
    assert result.status == 1
    assert len(re.findall(sentence, result.output)) == 1, result.output


def test_held_out_texts(data: Path) -> None:
    """Each is what the shards hold, goes on within its document, and overlaps no other."""
    whole = []
    for file in sorted((data / "val").glob("*.h5")):
        with h5py.File(file) as shard:
            tokens = shard["tokens"][:].tolist()
        whole += [tokens[start : start + 32] for start in range(0, len(tokens) - 31, 32)]
    split = DataSet(data)
    texts = held_out_texts(split, 32, 50, seed=4)
    assert texts == held_out_texts(split, 32, 50, seed=4) != held_out_texts(split, 32, 50, seed=5)
    for prompt, continuation in texts:
        window = next(each for each in whole if each[: 16 + len(continuation)] == prompt + continuation)
        whole.remove(window)
        assert len(prompt) == 16 and continuation and split.eos_id not in continuation
        assert len(continuation) == 16 or window[16 + len(continuation)] == split.eos_id
