"""A scaling study of a tiny model on one rank and on two, for tests."""

from __future__ import annotations

import sys
from pathlib import Path

import tomli_w

_SCALING = Path(__file__).parents[2] / "benchmarks" / "scaling.py"

_STUDY = {
    "name": "small",
    "ranks": [1, 2],
    "codecs": ["none"],
    "batch_sizes": [4],
    "repetitions": 1,
    "steps": 2,
    "settings": {"model": {"layers": 1, "heads": 2, "width": 32, "context_length": 32}},
}


def write_study(directory: Path, data: Path, **keys: object) -> list[str]:
    """Writes study.toml, and returns the words that run it; its points will lie in small-strong."""
    file = directory / "study.toml"
    file.write_text(tomli_w.dumps({**_STUDY, "data": str(data), **keys}), encoding="utf-8")
    return [sys.executable, str(_SCALING), "strong", str(file), "--output", str(directory)]
