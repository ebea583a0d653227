"""One curve, however many ranks compute it and whatever carries their messages."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
from jobs import Ranks, assert_bit_identical, assert_same_curve, losses, records, train
from pool import Pools
from thorough import thorough

from hvdlm.data.prepare import prepare


@pytest.fixture(scope="module")
def alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process without a launcher."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = train("none", 1, small_data, run_dir)
    assert result.status == 0, result.output
    assert "engine solo, because no launcher started this process" in result.output
    return run_dir


@pytest.fixture(scope="module")
def by_mpirun(pools: Pools, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of 2 ranks of engine mpi, by codec."""

    @functools.cache
    def train_by(codec: str) -> Path:
        run_dir = tmp_path_factory.mktemp(codec) / "run"
        result = Ranks(pools.get("mpi", "mpirun", 4)).train(2, small_data, run_dir, compression__codec=codec)
        assert result.status == 0, result.output
        return run_dir

    return train_by


def assert_same_run(run_dir: Path, alone: Path, ranks: int) -> None:
    curve = losses(run_dir)
    assert sorted(curve) == list(range(1, 51))
    assert_same_curve(curve, losses(alone), relative=1e-4)
    validation, expected = (records(path, "eval")[-1]["loss"] for path in (run_dir, alone))
    assert validation == pytest.approx(expected, rel=1e-4)
    assert {record["world_size"] for record in records(run_dir)} == {ranks}


@pytest.mark.parametrize(
    ("launcher", "engine", "said"),
    [
        ("mpirun", "auto", "engine mpi, because mpirun started this job and it computes on CPUs"),
        ("torchrun", "auto", "engine torch, because torchrun started this job"),
        ("horovodrun --gloo", "auto", "engine horovod, because horovodrun started this job"),
        thorough("horovodrun --mpi", "auto", "engine horovod, because horovodrun started this job"),
        thorough("mpirun", "torch", "engine torch, because comm.engine says so"),
        thorough("mpirun", "horovod", "engine horovod, because comm.engine says so"),
        thorough("horovodrun --gloo", "torch", "engine torch, because comm.engine says so"),
    ],
)
def test_every_launcher_and_engine(
    launcher: str,
    engine: str,
    said: str,
    small_data: Path,
    alone: Path,
    by_mpirun: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Two ranks of one host have but one sum of two numbers, so that it is one run whatever carries its messages."""
    result = train(launcher, 2, small_data, tmp_path / "run", comm__engine=engine)
    assert result.status == 0, result.output
    assert said in result.output
    assert_same_run(tmp_path / "run", alone, ranks=2)
    assert_bit_identical(tmp_path / "run", by_mpirun("none"))


@pytest.mark.parametrize("launcher", [thorough("horovodrun --gloo"), thorough("horovodrun --mpi")])
def test_a_codec_under_horovodrun_is_that_under_mpirun(
    launcher: str, small_data: Path, by_mpirun: Callable[[str], Path], tmp_path: Path
) -> None:
    result = train(launcher, 2, small_data, tmp_path / "run", compression__codec="int4")
    assert result.status == 0, result.output
    assert_bit_identical(tmp_path / "run", by_mpirun("int4"))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_same_curve(size: int, ranks: Ranks, small_data: Path, alone: Path, tmp_path: Path) -> None:
    result = ranks.train(size, small_data, tmp_path / "run")
    assert result.status == 0, result.output
    assert_same_run(tmp_path / "run", alone, size)


def test_the_model_learns(alone: Path) -> None:
    """From about ln 257 nats, what a model that knows nothing loses, to much less."""
    curve = losses(alone)
    assert curve[1] == pytest.approx(5.549, abs=0.1)
    assert curve[50] < 4


def test_a_run_leaves_everything_it_promises(alone: Path) -> None:
    assert (alone / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "global_batch_size = 16" in (alone / "config.toml").read_text(encoding="utf-8")
    checkpoint = alone / "checkpoints" / "step_00000050"
    assert (alone / "checkpoints" / "latest").read_text(encoding="utf-8").strip() == checkpoint.name
    assert json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"] == 50
    names = {
        "step", "loss", "mean_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds",
        "compute_seconds", "exposed_comm_seconds", "codec_seconds", "wire_bytes", "compression_ratio", "world_size",
        "memory_bytes", "utilisation", "kind",
    }  # fmt: skip
    assert len(records(alone)) == 50
    assert all(set(record) == names for record in records(alone))
    last = records(alone)[-1]
    assert last["tokens"] == 50 * 16 * 32
    parts = sum(float(str(last[name])) for name in ("data_seconds", "compute_seconds", "exposed_comm_seconds"))
    assert parts == pytest.approx(float(str(last["step_seconds"])))  # of one rank, so they add up


@pytest.mark.parametrize("precision", ["bf16", thorough("fp16")])
def test_low_precision_follows_fp32(
    precision: str, ranks: Ranks, small_data: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    result = ranks.train(2, small_data, run_dir, train__precision=precision)
    assert result.status == 0, result.output
    expected = losses(alone)
    # fp16 may skip its first steps while it looks for a loss scale, and is then as many steps behind
    late = sum("overflowed" in str(event["message"]) for event in records(run_dir, "event"))
    assert late <= 5
    assert losses(run_dir)[50] == pytest.approx(expected[50 - late], rel=0.05)
    assert losses(run_dir)[50] != pytest.approx(expected[50 - late], rel=1e-6)  # it was another arithmetic


def compiled_graphs(ranks: Ranks) -> int:
    """How many graphs torch.compile has made on the first rank of the pool."""
    (answer,) = ranks.pool.run(Path(commands.__file__), "compiled_graphs", 1)
    return int(answer.value)


@pytest.mark.thorough
def test_compiled_blocks_give_the_same_curve(ranks: Ranks, small_data: Path, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    before = compiled_graphs(ranks)
    result = ranks.train(2, small_data, run_dir, train__compile="true", train__steps=10)
    assert result.status == 0, result.output
    assert compiled_graphs(ranks) > before
    expected = {step: loss for step, loss in losses(alone).items() if step < 4}
    actual = {step: loss for step, loss in losses(run_dir).items() if step < 4}
    assert sorted(actual) == [1, 2, 3]
    assert_same_curve(actual, expected, relative=1e-4)


def test_documents_are_masked_alike_on_any_number_of_ranks(
    ranks: Ranks, small_data: Path, alone: Path, tmp_path: Path
) -> None:
    for size in (1, 2):
        result = ranks.train(size, small_data, tmp_path / str(size), model__document_mask="true", train__steps=10)
        assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "2"), losses(tmp_path / "1"), relative=1e-4)
    assert losses(tmp_path / "1")[10] != pytest.approx(losses(alone)[10], rel=1e-4)  # the mask matters


def test_llama_trains(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    llama = {
        "model__position": "rope", "model__norm": "rmsnorm", "model__activation": "swiglu", "model__bias": "false",
        "model__kv_heads": 1, "model__tie_embeddings": "false",
    }  # fmt: skip
    result = ranks.train(2, small_data, tmp_path / "run", **llama)
    assert result.status == 0, result.output
    assert losses(tmp_path / "run")[50] < 4


def test_more_ranks_than_sequences(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Ranks without a share take part with nothing, and nobody hangs."""
    for size in (1, 4):
        settings = {"train__global_batch_size": 2, "train__steps": 10, "train__evaluate_sequences": 3}
        result = ranks.train(size, small_data, tmp_path / str(size), **settings)
        assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "4"), losses(tmp_path / "1"), relative=1e-4)


def prepare_data(texts: list[str], output: Path, tokenizer: str, validation: float) -> Path:
    prepare(texts, output, tokenizer, 2, validation, workers=1, text_key="text", seed=0, skip_bad=True)
    return output


def test_data_set_without_validation(ranks: Ranks, tmp_path: Path, small_texts: list[str]) -> None:
    """Trains, says that there is no validation, and keeps what it trained."""
    data = prepare_data(small_texts, tmp_path / "data", "byte", validation=0.0)
    result = ranks.train(2, data, tmp_path / "run", train__steps=10)
    assert result.status == 0, result.output
    assert "no validation" in result.output
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").exists()


def test_evaluation_wants_the_tokenizer_of_the_model(
    ranks: Ranks, alone: Path, small_texts: list[str], tmp_path: Path
) -> None:
    data = prepare_data(small_texts[:2], tmp_path / "bpe", "bpe:300", validation=0.1)
    result = ranks.hvdlm(1, "evaluate", str(alone), "--data", str(data))
    assert result.status == 1
    assert "was trained with another tokenizer" in result.output
