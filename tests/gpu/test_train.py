"""`hvdlm train` on GPUs: its curve beside that of one process on a CPU in fp32, stopping and resuming."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from gpu_jobs import STEPS, assert_same_weights, command, train
from jobs import assert_same_curve, losses, records
from launcher import BIN, launcher_command, run, start

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(180)]

STOPPED_EARLY = 75  # exit status


@pytest.mark.parametrize(
    ("launcher", "ranks", "engine"),
    [
        ("none", 1, "auto"),
        ("mpirun", 2, "torch"),
        ("mpirun", 4, "mpi"),
        ("torchrun", 1, "torch"),
    ],
)
def test_the_curve_is_that_of_the_cpu(
    launcher: str, ranks: int, engine: str, data: Path, tmp_path: Path, cpu_curve: dict[int, float]
) -> None:
    curve = train(launcher, ranks, data, tmp_path / "run", "--comm.engine", engine)
    assert_same_curve(curve, cpu_curve, relative=1e-3)


@pytest.mark.parametrize(("precision", "codec"), [("bf16", "int4"), ("fp16", "fp16")])
def test_the_curve_in_16_bits(
    precision: str, codec: str, data: Path, tmp_path: Path, cpu_curve: dict[int, float]
) -> None:
    options = ["--comm.engine", "mpi", "--compression.codec", codec, "--train.precision", precision]
    curve = train("mpirun", 2, data, tmp_path / "run", *options)
    assert_same_curve(curve, cpu_curve, relative=3e-2)


def test_activation_checkpointing(data: Path, tmp_path: Path, cpu_curve: dict[int, float]) -> None:
    curve = train("none", 1, data, tmp_path / "run", "--train.activation_checkpointing", "true")
    assert_same_curve(curve, cpu_curve, relative=1e-3)


def test_one_visible_gpu_a_rank(data: Path, tmp_path: Path, cpu_curve: dict[int, float]) -> None:
    """As Slurm arranges it: on one GPU both see the same one, and share it and its peak; on more, each has its own."""
    gpus, ranks = torch.cuda.device_count(), 2
    own = f"CUDA_VISIBLE_DEVICES=$((OMPI_COMM_WORLD_RANK % {gpus})) exec "
    words = command(data, tmp_path / "run", "--comm.engine", "torch", "--train.precision", "bf16")
    result = run([*launcher_command("mpirun", ranks), "bash", "-c", own + shlex.join(words)], deadline=150)
    assert result.status == 0, result.output
    assert ("staged through pinned host memory" in result.output) == (gpus == 1)
    assert_same_curve(losses(tmp_path / "run"), cpu_curve, relative=3e-2)
    utilisation = records(tmp_path / "run")[-1]["utilisation"]
    assert utilisation is None or 0 < float(str(utilisation)) < 1


def test_stopped_and_resumed_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """With deterministic kernels the run that was stopped ends with the bits of the one that was not."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--train.deterministic", "true", "--train.precision", "bf16", "--train.compile", "false"]
    train("none", 1, data, whole, *options)
    with start(command(data, stopped, "--checkpoint.every", "1", *options)) as job:
        deadline = time.monotonic() + 100
        while not (stopped / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline and job.process.poll() is None, "no checkpoint"
            time.sleep(0.01)
        job.process.send_signal(signal.SIGTERM)
        result = job.finish(deadline=60)
    assert result.status == STOPPED_EARLY, result.output
    assert 1 <= max(losses(stopped)) < STEPS
    train("none", 1, data, stopped, "--resume", "latest", *options)
    assert_same_weights(whole, stopped)
    sample = run([str(BIN / "hvdlm"), "generate", str(stopped), "--prompt", "def ", "--tokens", "20"], deadline=60)
    assert sample.status == 0 and "def " in sample.output, sample.output
