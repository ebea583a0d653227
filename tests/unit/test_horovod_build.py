"""`hvdlm install-horovod` up to the build: what it finds, its plan, and its errors when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hvdlm.cluster.horovod_build import target as target_module
from hvdlm.cluster.horovod_build.command import run_logged
from hvdlm.cluster.horovod_build.target import Mpi, Target, find_target
from hvdlm.cluster.horovod_build.wheel_cache import build_directory, cached_wheel
from hvdlm.errors import HvdlmError

OUTSIDE = Mpi("Open MPI", "5.0.1", Path("/opt/mpi/bin/mpicxx"), Path("/opt/mpi/bin/mpirun"))
TARGET = Target("cpython-311 (3.11.7)", "2.13.0+cpu", "linux-x86_64 glibc 2.36", OUTSIDE, None)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `hvdlm install-horovod` with an empty cache and a fake MPI for which no Horovod has been built."""
    bin_directory = tmp_path / "bin"
    script(bin_directory / "mpicxx", "exit 1")
    script(bin_directory / "mpirun", "echo 'mpirun (Open MPI) 9.8.7'")

    def run(*arguments: str, path: str = os.environ["PATH"], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME", "NCCL_HOME")
        }
        environment |= {"HVDLM_CACHE": str(tmp_path / "cache"), "PATH": f"{bin_directory}:{path}", **variables}
        command = [sys.executable, "-m", "hvdlm", "install-horovod", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def fake_torch(tmp_path: Path) -> Callable[..., str]:
    """Writes a package `torch` that contains only its version; returns the directory for PYTHONPATH."""

    def write(version: str, cuda: str | None = None, hip: str | None = None) -> str:
        package = tmp_path / "packages" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\nhip = {hip!r}\n")
        return str(package.parent)

    return write


def sentence(run: subprocess.CompletedProcess[str]) -> str:
    """The only line that a failed command prints on standard error."""
    assert run.returncode == 1, run.stdout + run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert re.match(r"hvdlm\b.*: error: ", lines[0])
    return lines[0]


def test_key_differs_where_a_wheel_would_not_fit() -> None:
    variants = [
        TARGET,
        replace(TARGET, python="cpython-312 (3.12.1)"),
        replace(TARGET, torch="2.12.0+cpu"),
        replace(TARGET, platform="linux-aarch64 glibc 2.36"),
        replace(TARGET, mpi=None),
        replace(TARGET, mpi=replace(OUTSIDE, version="4.1.4")),
        replace(TARGET, mpi=replace(OUTSIDE, compiler=Path("/opt/other/bin/mpicxx"))),
    ]
    keys = [variant.key("0.28.1", "patches") for variant in variants] + [TARGET.key("0.28.1", "other patches")]
    assert len(set(keys)) == len(keys) == 8
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in keys)


def test_key_is_the_same_for_the_same_mpi_in_any_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for environment in ("/home/one/.venv", "/home/two/.venv"):
        monkeypatch.setattr(sys, "prefix", environment)
        inside = replace(
            OUTSIDE, compiler=Path(environment, "bin", "mpicxx"), launcher=Path(environment, "bin", "mpirun")
        )
        keys.add(replace(TARGET, mpi=inside).key("0.28.1"))
    assert len(keys) == 1
    assert keys != {TARGET.key("0.28.1")}


def test_without_mpi_there_is_gloo_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module.shutil, "which", lambda *_, **__: None)
    target = find_target()
    assert target.mpi is None
    assert target.controllers == ("gloo",)


def test_dry_run_prints_the_plan_and_builds_nothing(
    install: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = install("--dry-run")
    assert run.returncode == 0, run.stderr
    assert f"Open MPI 9.8.7, {tmp_path / 'bin' / 'mpicxx'}" in run.stdout
    assert "0.28.1+hvdlm" in run.stdout
    assert "To do: build a wheel, install it, prove it." in run.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_compiler_is_named(install: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    said = sentence(install("--dry-run", path=""))
    assert "no C++ compiler" in said and "apt install g++" in said


def test_missing_git_and_make_are_named(
    install: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    script(tools / "c++", "exit 0")
    assert "make is not on the PATH: install it" in sentence(install("--dry-run", path=str(tools)))
    script(tools / "make", "exit 0")
    assert "git is not on the PATH: install it" in sentence(install("--dry-run", path=str(tools)))


def test_a_compiler_that_cxx_names_but_is_not_there(install: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert "no C++ compiler (clang++-99 is not on the PATH)" in sentence(install("--dry-run", CXX="clang++-99"))


def test_mpi_without_launcher_is_an_error(
    install: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "mpirun").unlink()
    assert f"no working mpirun beside it ({tmp_path / 'bin' / 'mpirun'})" in sentence(install("--dry-run"))


def test_cache_that_cannot_be_written(install: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    said = sentence(install())
    assert f"cannot write to the cache directory {tmp_path / 'cache'}" in said and "set HVDLM_CACHE" in said


def test_small_disk_is_reported_before_the_build(
    install: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(cache)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        said = sentence(install())
        assert f"the disk of the cache directory {cache} has 16 MiB free" in said and "takes 1024" in said
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_build_directory_needs_room_and_is_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "left by a killed process").touch()
    with build_directory(tmp_path) as directory:
        assert list(directory.iterdir()) == []
    assert not directory.exists()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**34, 2**34 - 2**20, 2**20))
    with pytest.raises(HvdlmError, match="has 1 MiB free"), build_directory(tmp_path):
        pytest.fail("the build began without room for it")


def test_truncated_wheel_is_not_used(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod-0.28.1+hvdlm0123456789ab-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"PK\x03\x04 and then the disk was full")
    assert cached_wheel(tmp_path, "0.28.1+hvdlm0123456789ab") is None


def test_cuda_and_nccl_are_found(
    install: Callable[..., subprocess.CompletedProcess[str]], fake_torch: Callable[..., str], tmp_path: Path
) -> None:
    cuda, nccl = tmp_path / "cuda", tmp_path / "nccl"
    script(cuda / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (nccl / "include").mkdir(parents=True)
    (nccl / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 27\n#define NCCL_PATCH 3\n")
    variables = {"CUDA_HOME": str(cuda), "NCCL_HOME": str(nccl), "PYTHONPATH": fake_torch("2.13.0+cu130", cuda="13.0")}
    assert "NCCL (nccl.h and libnccl.so) is in none of" in sentence(install("--dry-run", **variables))
    (nccl / "lib").mkdir()
    (nccl / "lib" / "libnccl.so.2").touch()
    assert f"CUDA 13.0, {cuda}; NCCL 2.27.3" in install("--dry-run", **variables).stdout
    # PyTorch of another environment has its NCCL beside it
    theirs = Path(variables["PYTHONPATH"]) / "nvidia" / "nccl"
    theirs.parent.mkdir()
    nccl.rename(theirs)
    assert f"CUDA 13.0, {cuda}; NCCL 2.27.3" in install("--dry-run", **variables).stdout
    # A script on the PATH that calls an nvcc elsewhere, as environment modules install them.
    wrapper = "echo '#$ TOP=/opt/cuda-13/bin/..'; echo 'Cuda compilation tools, release 13.0, V13.0.88'"
    script(cuda / "bin" / "nvcc", wrapper)
    assert "CUDA 13.0, /opt/cuda-13; NCCL 2.27.3" in install("--dry-run", **variables).stdout
    script(cuda / "bin" / "nvcc", "echo 'Cuda compilation tools, release 12.8, V12.8.61'")
    assert "is of CUDA 12.8, but PyTorch is built for CUDA 13.0" in sentence(install("--dry-run", **variables))


def test_cuda_pytorch_without_toolkit_gets_a_cpu_build_only_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(target_module, "_torch", lambda: ("2.13.0+cu130", "13.0"))
    monkeypatch.setattr(target_module, "_nvcc", lambda: None)
    monkeypatch.setattr(target_module, "GPU_DRIVER", tmp_path / "nvidiactl")
    target = find_target()
    assert target.cuda is None
    assert target.note == "PyTorch is built for CUDA 13.0, but this machine has neither a GPU nor nvcc"
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(HvdlmError, match=r"there is a GPU, but no CUDA compiler .*install the CUDA toolkit 13\.0"):
        find_target()


def test_rocm_is_an_error(
    install: Callable[..., subprocess.CompletedProcess[str]], fake_torch: Callable[..., str]
) -> None:
    assert "is a ROCm build" in sentence(install("--dry-run", PYTHONPATH=fake_torch("2.13.0+rocm7", hip="7.0")))


def test_missing_pytorch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HvdlmError, match=r"PyTorch is missing from .*: install it first"):
        find_target()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("cc1plus: fatal error: x.s: No space left on device", "the disk is full"),
        ("error: externally-managed-environment", "make a virtual environment"),
        ("ERROR: No matching distribution found for wheel", "check the network"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("working\nsomething.cc:3: error: it is Tuesday\nmake: stop", "something.cc:3: error: it is Tuesday"),
        (
            "Building error.cc.o\nmath.h:9: error: no such type\nmake: stop",
            "exit status 3, math.h:9: error: no such type",
        ),
        ("working\nstopped halfway", "exit status 3, stopped halfway"),
        ("", "exit status 3 without output"),
    ],
)
def test_failed_commands_become_sentences(output: str, message: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", f"import sys; print({output!r}); sys.exit(3)"]
    with pytest.raises(HvdlmError) as failure:
        run_logged("compiling", command, log, os.environ)
    said = str(failure.value)
    assert said.startswith("compiling failed: ") and message in said and said.endswith(f"(log: {log})")
    assert output in log.read_text()


def test_command_returns_its_own_output_and_appends_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_logged("one", ["echo", "first"], log, os.environ) == "first\n"
    assert run_logged("two", ["echo", "second"], log, os.environ) == "second\n"
    assert log.read_text() == "\n$ echo first\nfirst\n\n$ echo second\nsecond\n"


def test_command_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match="proving failed: /no/such/program: No such file or directory"):
        run_logged("proving", ["/no/such/program"], tmp_path / "log", os.environ)


def test_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 600 & echo $! > {pid_file}; wait"]
    with pytest.raises(HvdlmError, match="proving failed: no end after 1 seconds"):
        run_logged("proving", command, tmp_path / "log", os.environ, timeout=1.0)
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the command's child lives on"
        time.sleep(0.05)
