"""The ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Pools of ranks, each started at its first use, all ended with the session."""
    pools = Pools()
    yield pools
    pools.close()
