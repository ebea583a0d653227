"""Values with which `make thorough` runs a test, and `make test` does not."""

from __future__ import annotations

from typing import Any

import pytest


def thorough(*values: object) -> Any:
    """For a list that `parametrize` is given."""
    return pytest.param(*values, marks=pytest.mark.thorough)
