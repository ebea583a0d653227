"""Ranks that divide a model, on GPUs: several on one, or each on its own, beside one process on a CPU in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_jobs import train
from jobs import assert_same_curve

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(180)]

LAYOUTS = {
    **{f"stage {stage}": (2, {"shard": stage}) for stage in (1, 2, 3)},
    "2 tensor ranks": (2, {"tensor": 2}),
    "2 stages": (2, {"pipeline": 2}),
    "2 stages, zero-bubble": (2, {"pipeline": 2, "schedule": "zero_bubble"}),
    "2 stages, ZB-H2": (2, {"pipeline": 2, "schedule": "zero_bubble_h2"}),
    "2 tensor ranks in stage 3": (4, {"tensor": 2, "shard": 3}),
    "2 tensor ranks in 2 stages": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.mark.parametrize("engine", ["mpi", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_of_a_layout(
    layout: str, engine: str, data: Path, tmp_path: Path, cpu_curve: dict[int, float]
) -> None:
    ranks, parallel = LAYOUTS[layout]
    options = [word for name, value in parallel.items() for word in (f"--parallel.{name}", str(value))]
    if str(parallel.get("schedule")).startswith("zero_bubble"):
        options += ["--train.compile", "false"]
    curve = train("mpirun", ranks, data, tmp_path / "run", "--comm.engine", engine, *options)
    assert_same_curve(curve, cpu_curve, relative=1e-3)


@pytest.mark.parametrize("layout", ["stage 2", "stage 3", "2 tensor ranks"])
def test_the_curve_of_a_layout_in_16_bits(layout: str, data: Path, tmp_path: Path, cpu_curve: dict[int, float]) -> None:
    ranks, parallel = LAYOUTS[layout]
    options = [word for name, value in parallel.items() for word in (f"--parallel.{name}", str(value))]
    curve = train("mpirun", ranks, data, tmp_path / "run", "--train.precision", "bf16", *options)
    assert_same_curve(curve, cpu_curve, relative=3e-2)
