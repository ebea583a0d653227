"""The ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jobs import Ranks
from pool import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Pools of ranks, each started at its first use, all ended with the session."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture
def ranks(pools: Pools) -> Ranks:
    """Up to 4 ranks of engine mpi for `hvdlm` commands."""
    return Ranks(pools.get("mpi", "mpirun", 4))
