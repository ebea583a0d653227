"""Runs with parameter servers: the curve of all-reduce, stopped, killed, resumed, and on other numbers of ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from jobs import Ranks, assert_bit_identical, assert_same_curve, losses, records, start_training, train
from safetensors.torch import load_file
from test_resume import as_if_killed, wait_for_step
from thorough import thorough

SAVING = {"checkpoint__every": 7, "checkpoint__keep": 9, "model__dropout": 0.1}
SLOW = {"optimizer__lr": 0.001}  # at which one rounding does not grow into another curve

# By name: what is compressed, and the precision to try it in
KINDS: dict[str, dict[str, object]] = {
    "none": {},
    "int8": {"compression__codec": "int8", "train__precision": "bf16"},
    "16 bits": {"compression__codec": "bf16", "server__pull": "bf16"},
}


@pytest.mark.thorough
def test_the_curve_of_all_reduce(small_data: Path, tmp_path: Path) -> None:
    """4 workers and 2 servers: 50 steps within 1e-6, the same validation, the same files but for rounding."""
    served, plain = tmp_path / "served", tmp_path / "plain"
    result = train("mpirun", 6, small_data, served, server__ranks=2, **SLOW)
    assert result.status == 0, result.output
    assert train("mpirun", 4, small_data, plain, **SLOW).status == 0
    assert_same_curve(losses(served), losses(plain), relative=1e-6)
    own, expected = (float(str(records(run, "eval")[0]["loss"])) for run in (served, plain))
    assert abs(own / expected - 1) < 1e-6
    assert {record["world_size"] for record in records(served)} == {4}
    for name in ("model", "optimizer"):
        files = [run / "checkpoints" / "step_00000050" / f"{name}.safetensors" for run in (served, plain)]
        saved, other = map(load_file, files)
        assert saved.keys() == other.keys()
        worst = max(float((saved[key] - other[key]).norm() / (other[key].norm() + 1e-9)) for key in saved)
        assert worst < 1e-3, worst


@pytest.mark.parametrize("kind", [*map(thorough, list(KINDS)[:-1]), list(KINDS)[-1]])
def test_killed_and_resumed(kind: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout; then on other numbers of workers and servers, and without any, on the same curve."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {**SAVING, **SLOW, **KINDS[kind], "train__evaluate_every": 25}
    result = ranks.train(4, small_data, whole, server__ranks=2, **settings)
    assert result.status == 0, result.output
    as_if_killed(whole, broken, 17)
    result = ranks.train(4, small_data, broken, "--resume", "latest", server__ranks=2, **settings)
    assert result.status == 0, result.output
    assert "step_00000014, step 14" in result.output
    assert_bit_identical(whole, broken)
    settings |= {"model__dropout": 0.0}
    unbroken = tmp_path / "unbroken"
    assert ranks.train(4, small_data, unbroken, server__ranks=2, **settings).status == 0
    settings.pop("server__pull", None)
    for size, servers in ((4, 1), (2, 0)):
        other = tmp_path / f"{servers} servers"
        as_if_killed(unbroken, other, 17)
        result = ranks.train(size, small_data, other, "--resume", "latest", server__ranks=servers, **settings)
        assert result.status == 0, result.output
        assert_same_curve(losses(other), losses(unbroken), relative=1e-5 if kind == "none" else 0.01)


def test_from_all_reduce_to_servers(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    settings = {**SLOW, "checkpoint__every": 7, "checkpoint__keep": 9}
    assert ranks.train(2, small_data, whole, **settings).status == 0
    as_if_killed(whole, other, 17)
    result = ranks.train(3, small_data, other, "--resume", "latest", server__ranks=1, **settings)
    assert result.status == 0, result.output
    assert_same_curve(losses(other), losses(whole), relative=1e-5)


@pytest.mark.thorough
def test_a_signal(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """All ranks, servers too, exit with 75; the run goes on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert ranks.train(3, small_data, whole, server__ranks=1, **SAVING).status == 0
    assert ranks.train(3, small_data, stopped, stop_after=9, server__ranks=1, **SAVING).status == 75
    assert ranks.train(3, small_data, stopped, "--resume", "latest", server__ranks=1, **SAVING).status == 0
    assert_bit_identical(whole, stopped)


@pytest.mark.parametrize("victim", [thorough(0), thorough(1), 2], ids=["first worker", "worker", "server"])
def test_kill_of_a_rank(victim: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """By SIGKILL: the launcher ends the rest, and the run goes on as if nothing had been."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = ranks.train(3, small_data, whole, server__ranks=1, **SAVING)
    assert result.status == 0, result.output
    with start_training("mpirun", 3, small_data, broken, server__ranks=1, **SAVING) as job:
        wait_for_step(job, broken, 17)
        job.ranks()[victim].kill()
        assert job.finish(deadline=120).status != 0
    assert max(losses(broken)) < 50
    result = ranks.train(3, small_data, broken, "--resume", "latest", server__ranks=1, **SAVING)
    assert result.status == 0, result.output
    assert_bit_identical(whole, broken)


def test_a_signal_to_a_server(small_data: Path, tmp_path: Path) -> None:
    """It tells the workers, which stop as if one of them had been asked."""
    with start_training("mpirun", 3, small_data, tmp_path / "run", server__ranks=1, train__steps=5000) as job:
        wait_for_step(job, tmp_path / "run", 5)
        job.ranks()[2].send_signal(signal.SIGTERM)
        result = job.finish(deadline=120)
    assert result.status == 75, result.output
    assert "go on with --resume latest" in result.output


def test_a_worker_that_cannot_go_on(small_data: Path, tmp_path: Path) -> None:
    """An error that all workers find ends the servers, too, with one sentence."""
    settings = {"optimizer__lr": 1e30, "optimizer__clip_norm": 0, "optimizer__warmup_steps": 0, "train__max_skipped": 0}
    result = train("mpirun", 3, small_data, tmp_path / "run", server__ranks=1, **settings)
    assert result.status != 0
    assert result.output.count("hvdlm: error:") == 1, result.output


def test_more_servers_than_ranks(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.train(2, small_data, tmp_path / "run", server__ranks=2)
    assert result.status == 1
    assert result.output.count("server.ranks = 2 of 2 ranks leaves none to train") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", [thorough("torchrun"), "horovodrun --gloo"])
def test_over_tcp(launcher: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Engines that have no probes: letters go over connections of their own, and the curve is that over MPI."""
    result = train(launcher, 3, small_data, tmp_path / "run", server__ranks=1, **SLOW)
    assert result.status == 0, result.output
    assert ranks.train(3, small_data, tmp_path / "other", server__ranks=1, **SLOW).status == 0
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "other"), relative=1e-6)


@pytest.mark.thorough
def test_a_codec_of_ones_own(small_data: Path, tmp_path: Path) -> None:
    """That has no messages for owners: refused at the start, by one sentence."""
    sign = f"{Path(__file__).parents[2] / 'examples' / 'custom_codec' / 'sign.py'}:Sign"
    result = train("mpirun", 2, small_data, tmp_path / "run", server__ranks=1, compression__codec=sign)
    assert result.status != 0
    assert result.output.count("cannot send gradients to servers") == 1, result.output
