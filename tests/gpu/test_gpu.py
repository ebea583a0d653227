"""What only a GPU shows, on a machine with at least one: `pytest -m needs_gpu tests/gpu`.

Two ranks may share one GPU: MPI and Gloo stage their messages through the host.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

import pytest
from jobs import assert_same_curve, losses
from launcher import BIN, launcher_command, run, start
from safetensors.torch import load_file

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.toml"
STEPS = 20
STOPPED_EARLY = 75  # exit status


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source text of Python's standard library, as bytes."""
    directory = tmp_path_factory.mktemp("data") / "python-stdlib"
    result = run(["hvdlm", "prepare", "--input", "python-stdlib", "--output", str(directory)], deadline=600)
    assert result.status == 0, result.output
    return directory


def command(data: Path, run_dir: Path, *options: str) -> list[str]:
    """`hvdlm train` of the quickstart in 20 steps on the GPU; later `options` win."""
    settings = {
        "data.path": data,
        "train.run_dir": run_dir,
        "train.steps": STEPS,
        "train.device": "cuda",
        "train.evaluate_sequences": 64,
        "optimizer.warmup_steps": 5,
        "log.every": 1,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [str(BIN / "hvdlm"), "train", str(QUICKSTART), *words, *options]


def train(ranks: int, data: Path, run_dir: Path, *options: str) -> dict[int, float]:
    """Trains, under mpirun if on more ranks than one, and returns the training loss by step, which must be finite."""
    launcher = launcher_command("mpirun" if ranks > 1 else "none", ranks)
    result = run([*launcher, *command(data, run_dir, *options)], deadline=600)
    assert result.status == 0, result.output
    curve = losses(run_dir)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for loss in curve.values()), curve
    return curve


@pytest.fixture(scope="module")
def cpu_curve(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of one process on the CPU."""
    return train(1, data, tmp_path_factory.mktemp("cpu") / "run", "--train.device", "cpu")


@pytest.mark.parametrize(("ranks", "engine"), [(1, "auto"), (2, "mpi"), (2, "torch")])
def test_the_curve_is_that_of_the_cpu(
    ranks: int, engine: str, data: Path, tmp_path: Path, cpu_curve: dict[int, float]
) -> None:
    curve = train(ranks, data, tmp_path / "run", "--comm.engine", engine)
    assert_same_curve(curve, cpu_curve, relative=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpt2_compiled_in_half_precision(precision: str, data: Path, tmp_path: Path) -> None:
    """124M parameters."""
    batch = ["--train.global_batch_size", "16", "--train.micro_batch_size", "16"]
    model = ["--model.preset", "gpt2", "--model.layers", "12"]
    how = ["--train.precision", precision, "--train.compile", "true"]
    curve = train(1, data, tmp_path / "run", *model, *batch, *how)
    assert min(curve.values()) < curve[1]


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4", "topk", "powersgd", "auto"])
def test_codec(codec: str, data: Path, tmp_path: Path) -> None:
    """Ranks check every five steps that they have the same model."""
    options = ["--comm.engine", "mpi", "--compression.codec", codec, "--train.check_replicas_every", "5"]
    curve = train(2, data, tmp_path / "run", *options)
    assert min(curve.values()) < curve[1]


def test_activation_checkpointing(data: Path, tmp_path: Path) -> None:
    curve = train(1, data, tmp_path / "run", "--train.precision", "bf16", "--train.activation_checkpointing", "true")
    assert min(curve.values()) < curve[1]


def test_stopped_and_resumed(data: Path, tmp_path: Path) -> None:
    """The run that was stopped ends with the parameters of the one that was not; then it writes some text."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(1, data, whole, "--checkpoint.every", "10")
    with start(command(data, stopped, "--checkpoint.every", "1")) as job:
        deadline = time.monotonic() + 300
        while not (stopped / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline and job.process.poll() is None, "no checkpoint"
            time.sleep(0.01)
        job.process.send_signal(signal.SIGTERM)
        result = job.finish(deadline=120)
    assert result.status == STOPPED_EARLY, result.output
    assert 1 <= max(losses(stopped)) < STEPS
    train(1, data, stopped, "--resume", "latest")
    last = [load_file(each / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors") for each in (whole, stopped)]
    assert last[0].keys() == last[1].keys() and last[0]
    worst = max(float((last[0][name] - last[1][name]).abs().max()) for name in last[0])
    assert worst < 1e-4
    sample = run(["hvdlm", "generate", str(stopped), "--prompt", "def ", "--tokens", "20"], deadline=300)
    assert sample.status == 0 and "def " in sample.output, sample.output


def test_sums_of_tensors(tmp_path: Path) -> None:
    """allreduce.py checks each sum by itself."""
    words = [sys.executable, str(ROOT / "benchmarks" / "allreduce.py"), "--device", "cuda", "--largest", "64mb"]
    words += ["--output", str(tmp_path), "--name", "gpu"]
    result = run([*launcher_command("mpirun", 2), *words], deadline=600)
    assert result.status == 0, result.output
    assert json.loads((tmp_path / "allreduce-gpu.json").read_text())


def test_trace_of_a_step(data: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "timeline.py"), str(QUICKSTART), "--data.path", str(data)]
    words += ["--train.device", "cuda", "--compression.codec", "fp16", "--output", str(tmp_path / "trace.json")]
    result = run([*launcher_command("mpirun", 2), *words], deadline=600)
    assert result.status == 0, result.output
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", ["gpt2", "gpt2-large", "llama-1b"])
def test_speed_of_one_rank(model: str, data: Path, tmp_path: Path) -> None:
    """That it can be measured; what it is, benchmarks/one_rank.py writes for who runs it."""
    systems = ["hvdlm bf16", "hvdlm bf16 compiled"]
    if model.startswith("gpt2"):
        systems.insert(0, "PyTorch bf16 autocast eager")
    words = [sys.executable, str(ROOT / "benchmarks" / "one_rank.py"), "--data", str(data), "--output", str(tmp_path)]
    result = run([*words, "--models", model, "--systems", *systems], deadline=3000)
    assert result.status == 0, result.output
    rows = json.loads((tmp_path / "one_rank.json").read_text())[model]["rows"]
    assert [row["name"] for row in rows] == systems
    assert all(row["tokens_per_second"] > 0 for row in rows)
