"""A rank that dies under torchrun, which then starts all ranks anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import assert_same_curve, command, losses
from launcher import run
from test_elastic import DYING
from thorough import thorough

C10D = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


@pytest.mark.parametrize(
    ("options", "keeps_its_store", "rank"), [thorough([], "0", 0), (C10D, "0", 1), thorough(C10D, "1", 0)]
)
def test_all_ranks_are_started_anew(
    options: list[str], keeps_its_store: str, rank: int, small_data: Path, tmp_path: Path
) -> None:
    """They find each other, also if torchrun does not lend them its store, and go on from the newest checkpoint."""
    settings = {"train__steps": 20, "optimizer__lr": 0.002}
    words = command(small_data, tmp_path / "run", "--resume", "latest", checkpoint__every=2, **settings)[1:]
    launcher = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", *options]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": keeps_its_store}
    result = run([*launcher, str(DYING), f"forward:7:{rank}", *words], deadline=120, extra=environment)
    assert result.status == 0, result.output
    (step,) = re.findall(r"resuming from \S+, step (\d+)", result.output)
    assert int(step) in (2, 4, 6), result.output
    alone = command(small_data, tmp_path / "alone", **settings)
    assert run(alone).status == 0
    assert list(losses(tmp_path / "run")) == list(range(1, 21))
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "alone"), relative=1e-4)
