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


# By inner optimizer: its rate, and how far it lets parameters grow apart by roundings; Muon computes in bf16
INNER = {"sgd": (0.1, 1e-6), "adamw": (0.001, 1e-4), "muon": (0.001, 1e-2)}


@pytest.mark.parametrize("algorithm", INNER)
def test_one_worker_is_local_steps_alone(algorithm: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Of one rank, whose outer optimizer steps by what it has learned: losses within 1e-6, the same checkpoint."""
    served, alone = tmp_path / "served", tmp_path / "alone"
    rate, apart = INNER[algorithm]
    settings = {"train__steps": 22, "train__evaluate_every": 9, "optimizer__algorithm": algorithm}
    settings |= {"optimizer__lr": rate}
    result = ranks.train(2, small_data, served, **{**SERVED, **settings})
    assert result.status == 0, result.output
    assert ranks.train(1, small_data, alone, **{**LOCAL, **settings}).status == 0
    own, expected = ({each["step"]: each for each in records(run)} for run in (served, alone))
    assert own.keys() == expected.keys() == {4, 8, 12, 16, 20, 22}
    for step, line in own.items():
        assert abs(float(str(line["loss"])) / float(str(expected[step]["mean_loss"])) - 1) < 1e-6
        assert line["lr"] == expected[step]["lr"]
        assert (line["staleness"], line["rounds"]) == (0.0, -(-step // 4))
    for name in ("model", "optimizer"):
        first, second = (
            load_file(run / "checkpoints" / "step_00000022" / f"{name}.safetensors") for run in (served, alone)
        )
        assert first.keys() == second.keys()
        worst = max(float((first[key] - second[key]).norm() / (second[key].norm() + 1e-9)) for key in first)
        assert worst < (apart if name == "model" else 100 * apart), worst
    # Validated where the first round after step 9, and after step 18, ends
    assert [each["step"] for each in records(served, "eval")] == [12, 20, 22]
    final = [float(str(records(run, "eval")[-1]["loss"])) for run in (served, alone)]
    assert abs(final[0] / final[1] - 1) < 1e-6


def test_killed_and_resumed(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Bit for bit, residuals and moments of the worker too; then by local steps among ranks, and by every step."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {**SERVED, "local_steps__every": 7, "model__dropout": 0.1}
    settings |= {"compression__codec": "topk", "compression__density": 0.2, "compression__warmup_steps": 1}
    result = ranks.train(2, small_data, whole, **settings)
    assert result.status == 0, result.output
    as_if_killed(whole, broken, 17)
    result = ranks.train(2, small_data, broken, "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert "step_00000014, step 14" in result.output
    assert_bit_identical(whole, broken)
    alike = {"optimizer__lr": 0.001, "model__dropout": 0.1}
    # Every step has no outer momentum to go on by
    for size, changed, apart in ((2, {**LOCAL, **alike}, 0.05), (1, alike, 0.1)):
        other = tmp_path / str(size)
        as_if_killed(whole, other, 17)
        result = ranks.train(size, small_data, other, "--resume", "latest", **changed)
        assert result.status == 0, result.output
        final = [float(str(records(run, "eval")[-1]["loss"])) for run in (whole, other)]
        assert abs(final[1] / final[0] - 1) < apart, final
