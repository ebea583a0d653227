"""Several ranks on one GPU, whose messages go through the host, and one rank of NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import RankPool

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(150)]

BODY = Path(__file__).with_name("gpu_body.py")
CHECKS = ["check_operations", "check_start_and_replicas", "check_backward_pass_beside_sums"]
CODECS = ["none", "fp16", "bf16", "int8", "int4", "int2", "topk", "topk2", "powersgd", "auto"]

# Engine torch takes Gloo where ranks share a GPU, and NCCL for the one rank of torchrun
POOLS = [("mpi", "mpirun", 4), ("torch", "mpirun", 4), ("torch", "torchrun", 1)]
_EACH_BESIDE_THE_OTHERS = [pytest.param(each, marks=pytest.mark.xdist_group(f"{each}")) for each in POOLS]


@pytest.fixture(scope="module", params=_EACH_BESIDE_THE_OTHERS, ids=lambda pool: f"{pool[0]} {pool[2]}")
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    ranks = RankPool(*request.param)
    try:
        yield ranks
        ranks.close()
    finally:
        ranks.kill()


def sizes(pool: RankPool) -> list[int]:
    return [2, 4] if pool.size == 4 else [1]


@pytest.mark.parametrize("check", CHECKS)
def test_check(pool: RankPool, check: str) -> None:
    for size in sizes(pool):
        pool.run(BODY, check, size, deadline=100)


@pytest.mark.parametrize("codec", CODECS)
def test_codec(pool: RankPool, codec: str) -> None:
    for size in sizes(pool):
        pool.run(BODY, "check_codec", size, deadline=100, codec=codec)
