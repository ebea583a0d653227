"""One body, communicator_body.py, on every engine at 1, 2, 3 and 4 ranks, and under every launcher."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import run_ranks

BODY = Path(__file__).with_name("communicator_body.py")

WAYS = [
    ("mpi", "mpirun"),
    ("torch", "mpirun"),
    ("torch", "torchrun"),
    ("horovod", "horovodrun --gloo"),
    ("horovod", "horovodrun --mpi"),
]


# 1 and 3 ranks are no different from launcher to launcher: one of each engine tells
@pytest.mark.parametrize(
    ("engine", "launcher", "ranks"),
    [(*way, ranks) for way in WAYS for ranks in (2, 4)] + [(*way, ranks) for way in WAYS[::2] for ranks in (1, 3)],
)
def test_every_operation(engine: str, launcher: str, ranks: int) -> None:
    splitting = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    result = run_ranks(launcher, ranks, [str(BODY), engine, str(ranks)], extra=splitting)
    assert result.status == 0, result.output
    for rank in range(ranks):
        assert f"rank {rank} of {ranks} finished" in result.output, result.output


def test_horovod_says_what_splitting_needs() -> None:
    script = "from hvdlm.comm.launch import connect; connect('horovod', 60).split(0, 0)"
    result = run_ranks("mpirun", 2, ["-c", script], extra={"HOROVOD_DYNAMIC_PROCESS_SETS": "0"})
    assert result.status != 0
    assert "only if HOROVOD_DYNAMIC_PROCESS_SETS=1 is in the environment" in result.output


def test_every_operation_alone() -> None:
    result = run_ranks("none", 1, [str(BODY), "solo", "1"])
    assert result.status == 0, result.output
    assert "rank 0 of 1 finished" in result.output


def test_torch_without_a_launcher() -> None:
    result = run_ranks("none", 1, [str(BODY), "torch", "1"])
    assert result.status == 0, result.output
