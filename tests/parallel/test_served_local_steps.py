"""Local steps against parameter servers: one worker is plain DiLoCo, and a run that was killed goes on as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Ranks, assert_bit_identical, records
from safetensors.torch import load_file
from test_resume import as_if_killed

LOCAL = {
    "local_steps__every": 4,
    "local_steps__lr": 0.7,
    "local_steps__momentum": 0.5,
    "optimizer__lr": 0.001,
    "comm__bucket_mb": 0.02,
}
SERVED = {**LOCAL, "server__ranks": 1, "server__max_staleness": 2, "checkpoint__every": 7, "checkpoint__keep": 9}


def saved(run_dir: Path, name: str) -> dict:
    return load_file(run_dir / "checkpoints" / "step_00000050" / f"{name}.safetensors")


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_one_worker_is_local_steps_alone(algorithm: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Of one rank, whose outer optimizer steps by what it has learned: parameters, momentum and losses within 1e-6."""
    served, alone = tmp_path / "served", tmp_path / "alone"
    settings = {"optimizer__algorithm": algorithm, "train__evaluate_every": 25}
    result = ranks.train(2, small_data, served, **SERVED, **settings)
    assert result.status == 0, result.output
    assert ranks.train(1, small_data, alone, **LOCAL, **settings).status == 0
    own, expected = ({each["step"]: each for each in records(run)} for run in (served, alone))
    assert own.keys() == expected.keys() == {*range(4, 49, 4), 50}
    for step, line in own.items():
        assert abs(float(str(line["loss"])) / float(str(expected[step]["mean_loss"])) - 1) < 1e-6
        assert line["lr"] == expected[step]["lr"]
        assert (line["staleness"], line["rounds"]) == (0.0, -(-step // 4))
    for name in ("model", "optimizer"):
        first, second = saved(served, name), saved(alone, name)
        assert first.keys() == second.keys()
        worst = max(float((first[key] - second[key]).norm() / (second[key].norm() + 1e-9)) for key in first)
        assert worst < (1e-6 if name == "model" else 1e-3), worst
    # Validated where the first round after step 25 ends
    assert [each["step"] for each in records(served, "eval")] == [28, 50]
    final = [float(str(records(run, "eval")[-1]["loss"])) for run in (served, alone)]
    assert abs(final[0] / final[1] - 1) < 1e-6


def test_killed_and_resumed(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Bit for bit, residuals and moments of the worker too; then by local steps among ranks, and by every step."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {**SERVED, "compression__codec": "int8", "model__dropout": 0.1}
    result = ranks.train(2, small_data, whole, **settings)
    assert result.status == 0, result.output
    as_if_killed(whole, broken, 17)
    result = ranks.train(2, small_data, broken, "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert "step_00000016, step 16" in result.output
    assert_bit_identical(whole, broken)
    for size, changed in ((2, {**LOCAL, "checkpoint__every": 7}), (1, {"optimizer__lr": 0.001})):
        other = tmp_path / str(size)
        as_if_killed(whole, other, 17)
        result = ranks.train(size, small_data, other, "--resume", "latest", **changed)
        assert result.status == 0, result.output
        final = [float(str(records(run, "eval")[-1]["loss"])) for run in (whole, other)]
        assert abs(final[1] / final[0] - 1) < 0.03, final
