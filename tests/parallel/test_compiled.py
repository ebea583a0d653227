"""Loops of codecs are compiled wherever they are imported, whether or not Numba can keep them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import caching

import hvdlm
from hvdlm.gradients.codecs.compiled import cache_problem, compiled

PACKAGE = Path(hvdlm.__file__).parent

# Beside a package that cannot be written to, in a mount namespace of its own, and without a home
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
EVERY_CODEC = """
import torch
from hvdlm.gradients.codecs import cast, integer, low_rank, topk
from hvdlm.gradients.codecs.compiled import cache_problem
assert cache_problem() is not None
assert cast.add_residual(torch.tensor([1.0, -3.0]), None) == 3.0
"""


def double(values: np.ndarray) -> None:
    for index in range(len(values)):
        values[index] *= 2


def doubles(function: Any) -> bool:
    values = np.array([1.0, 2.0], np.float32)
    function(values)
    return values.tolist() == [2.0, 4.0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory in which Numba may keep anything."""
    monkeypatch.setattr(caching.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, and a package that somebody else has installed."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert doubles(compiled()(double))
    assert str(cache_problem()).startswith("Numba can write to neither")


@pytest.mark.needs_root
def test_every_codec_is_imported_where_nothing_can_be_kept(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    environment = {**kept, "HOME": "/proc/none", "PYTHONPATH": str(PACKAGE.parent)}
    words = ["unshare", "--mount", "sh", "-c", READ_ONLY, PACKAGE, sys.executable, "-c", EVERY_CODEC]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_where_it_can(cache: Path) -> None:
    assert cache_problem() is None
    assert doubles(compiled()(double))
    assert list(cache.rglob("*.nbi")) and list(cache.rglob("*.nbc"))
    again = compiled()(double)
    assert doubles(again)
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_a_crash_has_cut_short_is_compiled_again(cache: Path, suffix: str) -> None:
    assert doubles(compiled()(double))
    for file in cache.rglob(f"*.{suffix}"):
        file.write_bytes(b"")
    assert doubles(compiled()(double))


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def save(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", save)
    with caplog.at_level(logging.DEBUG, logger="hvdlm"):
        assert doubles(compiled()(double))
    assert "cannot keep a compiled function: [Errno 28] No space left on device" in caplog.text
