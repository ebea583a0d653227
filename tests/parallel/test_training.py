"""One curve, however many ranks compute it and whatever carries their messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import assert_same_curve, command, losses, records, train
from launcher import BIN, launcher_command, run


@pytest.fixture(scope="module")
def alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process without a launcher."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = train("none", 1, small_data, run_dir)
    assert result.status == 0, result.output
    return run_dir


@pytest.mark.parametrize(
    ("engine", "launcher", "ranks"),
    [
        ("mpi", "mpirun", 1),
        ("mpi", "mpirun", 2),
        ("mpi", "mpirun", 3),
        ("mpi", "mpirun", 4),
        ("torch", "mpirun", 2),
        ("torch", "horovodrun --gloo", 2),
        ("horovod", "horovodrun --gloo", 2),
        ("horovod", "horovodrun --mpi", 2),
        ("horovod", "mpirun", 2),
    ],
)
def test_same_curve(engine: str, launcher: str, ranks: int, small_data: Path, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = train(launcher, ranks, small_data, run_dir, comm__engine=engine)
    assert result.status == 0, result.output
    curve = losses(run_dir)
    assert sorted(curve) == list(range(1, 51))
    assert_same_curve(curve, losses(alone), relative=1e-4)
    validation, expected = (records(path, "eval")[-1]["loss"] for path in (run_dir, alone))
    assert validation == pytest.approx(expected, rel=1e-4)
    assert f"engine {engine}, because comm.engine says so" in result.output
    assert {record["world_size"] for record in records(run_dir)} == {ranks}


def test_the_model_learns(alone: Path) -> None:
    """From about ln 257 nats, what a model that knows nothing loses, to much less."""
    curve = losses(alone)
    assert curve[1] == pytest.approx(5.549, abs=0.1)
    assert curve[50] < 4


def test_a_run_leaves_everything_it_promises(alone: Path) -> None:
    assert (alone / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "batch_size = 16" in (alone / "config.toml").read_text(encoding="utf-8")
    checkpoint = alone / "checkpoints" / "step_00000050"
    assert (alone / "checkpoints" / "latest").read_text(encoding="utf-8").strip() == checkpoint.name
    assert json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"] == 50
    names = {
        "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds",
        "compute_seconds", "exposed_comm_seconds", "codec_seconds", "wire_bytes", "compression_ratio", "world_size",
        "memory_bytes", "utilisation", "kind",
    }  # fmt: skip
    assert all(set(record) == names for record in records(alone))
    last = records(alone)[-1]
    assert last["tokens"] == 50 * 16 * 32
    parts = sum(float(str(last[name])) for name in ("data_seconds", "compute_seconds", "exposed_comm_seconds"))
    assert parts == pytest.approx(float(str(last["step_seconds"])))  # of one rank, so they add up


def test_auto_picks_by_launcher(small_data: Path, tmp_path: Path) -> None:
    for launcher, ranks, said in (
        ("none", 1, "engine solo, because no launcher started this process"),
        ("mpirun", 2, "engine mpi, because mpirun started this job and it computes on CPUs"),
        ("horovodrun --gloo", 2, "engine horovod, because horovodrun started this job"),
        ("horovodrun --mpi", 2, "engine horovod, because horovodrun started this job"),
    ):
        result = train(launcher, ranks, small_data, tmp_path / launcher / "run", train__steps=5)
        assert result.status == 0, result.output
        assert said in result.output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(precision: str, small_data: Path, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = train("mpirun", 2, small_data, run_dir, train__precision=precision)
    assert result.status == 0, result.output
    expected = losses(alone)
    # fp16 may skip its first steps while it looks for a loss scale, and is then as many steps behind
    late = sum("overflowed" in str(event["message"]) for event in records(run_dir, "event"))
    assert late <= 5
    assert losses(run_dir)[50] == pytest.approx(expected[50 - late], rel=0.05)
    assert losses(run_dir)[50] != pytest.approx(expected[50 - late], rel=1e-6)  # it was another arithmetic


def test_compiled_blocks_give_the_same_curve(small_data: Path, alone: Path, tmp_path: Path) -> None:
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    words = command(small_data, run_dir, train__compile="true", train__steps=10)
    result = run([*launcher_command("mpirun", 2), *words], extra={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    assert result.status == 0, result.output
    assert any(cache.rglob("*.so")) or any(cache.rglob("*.cpp"))  # something was compiled
    expected = {step: loss for step, loss in losses(alone).items() if step < 4}
    actual = {step: loss for step, loss in losses(run_dir).items() if step < 4}
    assert_same_curve(actual, expected, relative=1e-4)


def test_documents_are_masked_alike_on_any_number_of_ranks(small_data: Path, alone: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        result = train("mpirun", ranks, small_data, tmp_path / str(ranks), model__document_mask="true", train__steps=10)
        assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "2"), losses(tmp_path / "1"), relative=1e-4)
    assert losses(tmp_path / "1")[10] != pytest.approx(losses(alone)[10], rel=1e-4)  # the mask matters


def test_llama_trains(small_data: Path, tmp_path: Path) -> None:
    llama = {
        "model__position": "rope", "model__norm": "rmsnorm", "model__activation": "swiglu", "model__bias": "false",
        "model__kv_heads": 1, "model__tie_embeddings": "false",
    }  # fmt: skip
    result = train("mpirun", 2, small_data, tmp_path / "run", **llama)
    assert result.status == 0, result.output
    assert losses(tmp_path / "run")[50] < 4


def test_more_ranks_than_sequences(small_data: Path, tmp_path: Path) -> None:
    """Ranks without a share take part with nothing, and nobody hangs."""
    for ranks in (1, 4):
        settings = {"train__batch_size": 2, "train__steps": 10, "train__evaluate_sequences": 3}
        result = train("mpirun", ranks, small_data, tmp_path / str(ranks), **settings)
        assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "4"), losses(tmp_path / "1"), relative=1e-4)


def test_data_set_without_validation(tmp_path: Path, small_texts: list[str]) -> None:
    """Trains, says that there is no validation, and keeps what it trained."""
    prepared = run(
        [
            str(BIN / "hvdlm"),
            "prepare",
            "--input",
            *small_texts,
            "--output",
            str(tmp_path / "data"),
            "--validation",
            "0",
        ]
    )
    assert prepared.status == 0, prepared.output
    result = train("mpirun", 2, tmp_path / "data", tmp_path / "run", train__steps=10)
    assert result.status == 0, result.output
    assert "no validation" in result.output
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").exists()


def test_evaluation_wants_the_tokenizer_of_the_model(alone: Path, small_texts: list[str], tmp_path: Path) -> None:
    words = ["prepare", "--input", *small_texts, "--output", str(tmp_path / "bpe"), "--tokenizer", "bpe:300"]
    assert run([str(BIN / "hvdlm"), *words, "--shards", "2", "--validation", "0.1"]).status == 0
    result = run([str(BIN / "hvdlm"), "evaluate", str(alone), "--data", str(tmp_path / "bpe")])
    assert result.status == 1
    assert "was trained with another tokenizer" in result.output


def test_evaluation_is_the_same_on_any_number_of_ranks(small_data: Path, alone: Path) -> None:
    """And the table shows the baselines that a trained model must beat."""
    tables = []
    for launcher, ranks in (("none", 1), ("mpirun", 3)):
        words = [str(BIN / "hvdlm"), "evaluate", str(alone), "--data", str(small_data)]
        result = run([*launcher_command(launcher, ranks), *words])
        assert result.status == 0, result.output
        tables.append([line.split() for line in result.output.splitlines() if " model " in line or "baseline" in line])
    assert [row[:3] for row in tables[0]] == [row[:3] for row in tables[1]]
    assert len(tables[0]) == 3
