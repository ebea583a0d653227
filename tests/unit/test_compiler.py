"""What train.compile needs of a host, and the sentence where it is missing."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from hvdlm.config import Config, load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.model import check_compiler

CPU = torch.device("cpu")


def compiled() -> Config:
    return load(None, ["--train.compile", "true"], PRESETS)


def test_a_host_that_builds_horovod_has_all_it_takes() -> None:
    check_compiler(compiled(), CPU)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HvdlmError, match=r"no C\+\+ compiler no-such-compiler: install .* train.compile = false"):
        check_compiler(compiled(), CPU)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(HvdlmError, match=f"no header {tmp_path}/Python.h"):
        check_compiler(compiled(), CPU)


def test_nothing_is_asked_of_a_host_that_compiles_nothing_for_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(load(None, [], PRESETS), CPU)
    check_compiler(compiled(), torch.device("cuda"))
