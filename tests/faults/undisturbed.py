"""Runs in which nobody dies, to compare others with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import Result


def made_once(train: Callable[..., Result], factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made_once(...)(**overrides)`: the run directory of `train(run_dir, **overrides)`, which runs once for each."""
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = repr(sorted(overrides.items()))
        if key not in made:
            made[key] = factory.mktemp("undisturbed") / "run"
            result = train(made[key], **overrides)
            assert result.status == 0, result.output
        return made[key]

    return make
