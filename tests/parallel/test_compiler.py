"""What train.compile needs of a host, and the sentence where it is missing."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from forked import hvdlm

from hvdlm.config import Config
from hvdlm.config_reader import load
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


def noexec_directory() -> Path | None:
    """A directory of this machine on a file system that is mounted noexec, as Docker mounts /dev/shm."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, directory, kind, options, *_ = line.split()
        if kind == "tmpfs" and {"rw", "noexec"} <= set(options.split(",")) and os.access(directory, os.W_OK):
            return Path(directory)
    return None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cache_that_is_mounted_noexec(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = noexec_directory()
    if there is None:  # what the system says to it

        def refuse(*_: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(mmap, "mmap", refuse)
    with tempfile.TemporaryDirectory(dir=there) as folder:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        with pytest.raises(HvdlmError, match=rf"cannot execute what it writes to {folder} \(Operation .* noexec: name"):
            check_compiler(compiled(), torch.device(device))
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cache_that_cannot_be_written(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (("/proc/cache", "No such file or directory"), (tmp_path / "file", "File exists")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
        with pytest.raises(
            HvdlmError, match=rf"cannot write 8 MiB to {path} \({reason}\).* in TORCHINDUCTOR_CACHE_DIR"
        ):
            check_compiler(compiled(), torch.device(device))


def test_a_cache_that_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(HvdlmError, match=r"cannot write 8 MiB to .*/new \(File too large\)"):
            check_compiler(compiled(), CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: fatal error: cannot find libgomp.spec' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        HvdlmError, match=r"c\+\+ cannot make a library \(c\+\+: fatal error: cannot find libgomp.spec\)"
    ):
        check_compiler(compiled(), CPU)


@torch._inductor.config.patch(cpp_cache_precompile_headers=True)  # restored, which monkeypatch cannot do to this module
def test_no_room_for_precompiled_headers_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They have a directory of their own, with the default name, and need openssl."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = torch._inductor.config
    headers = tmp_path / "temporary" / "torchinductor_me" / "precompiled_headers"
    monkeypatch.setattr(
        "torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: str(headers.parent), raising=True
    )
    free = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    check_compiler(compiled(), CPU)
    assert config.cpp_cache_precompile_headers == (shutil.which("openssl") is not None)
    config.cpp_cache_precompile_headers = True
    free = free._replace(free=2**20)
    check_compiler(compiled(), CPU)
    assert not config.cpp_cache_precompile_headers
    config.cpp_cache_precompile_headers = True
    free = free._replace(free=2**30)
    shutil.rmtree(headers.parent)
    headers.parent.touch()
    check_compiler(compiled(), CPU)
    assert not config.cpp_cache_precompile_headers


def test_training_is_refused_before_the_run_directory_is_taken(small_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[data]\npath = '{small_data}'\n[train]\nrun_dir = 'run'\ncompile = true\n")
    done = hvdlm("train", config, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR="/proc/cache")
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [config])
    assert done.stderr.splitlines()[-1].startswith("hvdlm: error: train.compile cannot write 8 MiB to /proc/cache (")
    assert "Traceback" not in done.stderr


def test_a_cache_that_cannot_be_made_is_no_obstacle_where_nothing_is_compiled(small_data: Path, tmp_path: Path) -> None:
    """PyTorch would make it with its first optimizer."""
    config = tmp_path / "config.toml"
    sizes = "layers = 1\nwidth = 16\nheads = 1\nmlp_width = 16\ncontext_length = 16\n"
    train = "run_dir = 'run'\nsteps = 1\nglobal_batch_size = 1\nevaluate_sequences = 1\n"
    config.write_text(f"[data]\npath = '{small_data}'\n[model]\n{sizes}[train]\n{train}[optimizer]\nwarmup_steps = 0\n")
    for words in ([], ["--dry-run"]):
        done = hvdlm("train", config, *words, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR="/proc/cache")
        assert done.returncode == 0, done.stderr


def test_nothing_is_asked_of_a_host_that_compiles_nothing_for_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(load(None, [], PRESETS), CPU)
    check_compiler(compiled(), torch.device("cuda"))
