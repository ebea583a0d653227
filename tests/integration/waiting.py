"""Waiting for something that happens elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], deadline: float, what: str) -> None:
    """Returns once `condition` holds; fails after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"no {what} within {deadline:g} s"
        time.sleep(0.1)
