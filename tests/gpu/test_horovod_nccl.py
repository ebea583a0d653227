"""Horovod built with NCCL: one rank a GPU, so that all ranks of the pool are those that this machine has GPUs for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pool import RankPool

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(300)]

BODY = Path(__file__).with_name("gpu_body.py")
CODECS = ["none", "fp16", "bf16", "int8", "int4", "int2", "topk", "topk2", "powersgd", "auto"]
BUILD_SECONDS = 240.0


@pytest.fixture(scope="module")
def is_built() -> None:
    """Waits for the build that benchmarks/gpu_check.sh has started, if it has; skips where Horovod has no NCCL."""
    folder = os.environ.get("HVDLM_GPU_RESULTS")
    status = Path(folder) / "horovod.status" if folder else None
    deadline = time.monotonic() + BUILD_SECONDS
    while status and not status.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    if status and not status.exists():
        pytest.skip("Horovod is still being built")
    if status and status.read_text().strip() == "no nvcc":
        pytest.skip("there is no nvcc to build Horovod with NCCL")
    assert not status or status.read_text().strip() == "0", (status.parent / "horovod.log").read_text()[-2000:]
    util = pytest.importorskip("horovod.common.util")
    if not util.nccl_built():
        pytest.skip("Horovod is built without NCCL")


@pytest.fixture(scope="module")
def pool(is_built: None) -> Iterator[RankPool]:
    ranks = RankPool("horovod", "horovodrun --gloo", torch.cuda.device_count())
    try:
        yield ranks
        ranks.close()
    finally:
        ranks.kill()


@pytest.mark.parametrize("check", ["check_operations", "check_start_and_replicas", "check_backward_pass_beside_sums"])
def test_check(pool: RankPool, check: str) -> None:
    pool.run(BODY, check, pool.size, deadline=100)


@pytest.mark.parametrize("codec", CODECS)
def test_codec(pool: RankPool, codec: str) -> None:
    pool.run(BODY, "check_codec", pool.size, deadline=100, codec=codec)
