"""Local steps and Dion on a GPU: their curves beside those of as many ranks on CPUs, and resuming with a round under
way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_jobs import STEPS, assert_same_weights, command, train
from jobs import assert_same_curve, losses
from launcher import launcher_command, run

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(180)]

LOCAL_STEPS = ["--local_steps.every", "4"]
STREAMED = [*LOCAL_STEPS, "--local_steps.fragments", "2", "--local_steps.overlap", "2"]


@pytest.mark.parametrize(
    ("options", "relative"),
    [
        (LOCAL_STEPS, 1e-3),
        ([*STREAMED, "--local_steps.momentum", "0.9", "--local_steps.lr", "0.7"], 1e-3),
        ([*STREAMED, "--compression.codec", "int4", "--local_steps.warmup_steps", "3"], 1e-2),
        ([*STREAMED, "--compression.codec", "topk2", "--compression.density", "0.05"], 2e-2),
        (["--optimizer.algorithm", "dion"], 5e-3),
        (["--optimizer.algorithm", "muon"], 5e-3),
    ],
    ids=["local steps", "momentum", "int4", "topk2", "dion", "muon"],
)
def test_the_curve_is_that_of_cpus(options: list[str], relative: float, data: Path, tmp_path: Path) -> None:
    options = ["--comm.engine", "mpi", *options]
    expected = train("mpirun", 2, data, tmp_path / "cpu", "--train.device", "cpu", *options)
    assert_same_curve(train("mpirun", 2, data, tmp_path / "gpu", *options), expected, relative)


def test_an_interval_is_chosen(data: Path, tmp_path: Path) -> None:
    options = ["--comm.engine", "mpi", "--local_steps.every", "auto", "--compression.codec", "int8"]
    result = run([*launcher_command("mpirun", 2), *command(data, tmp_path / "run", *options)], deadline=150)
    assert result.status == 0, result.output
    assert re.search(r"local_steps\.every = \d+, local_steps\.overlap = \d+", result.output), result.output
    assert max(losses(tmp_path / "run")) == STEPS


def test_resumed_bit_for_bit_with_a_round_under_way(data: Path, tmp_path: Path) -> None:
    """A round begins after step 10 and ends after step 12: one that was saved after step 11 goes on."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ["--comm.engine", "mpi", "--train.deterministic", "true", "--train.compile", "false", *STREAMED]
    options += ["--compression.codec", "int4", "--checkpoint.every", "11", "--checkpoint.keep", "9"]
    train("mpirun", 2, data, whole, *options)
    saved = whole / "checkpoints" / "step_00000011"
    words = command(data, resumed, *options, "--resume", str(saved))
    result = run([*launcher_command("mpirun", 2), *words], deadline=150)
    assert result.status == 0, result.output
    assert_same_weights(whole, resumed)
