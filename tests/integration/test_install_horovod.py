"""Horovod as `hvdlm install-horovod` leaves it, and the ways in which building it fails; needs a package index."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from horovod.runner.common.util.hosts import parse_host_files

from hvdlm.cluster.horovod_build import source
from hvdlm.cluster.horovod_build.source import fetch, unpack_and_patch
from hvdlm.errors import HvdlmError

RANK = """
import os, sys
import horovod.torch as hvd
hvd.init()
print("rank", hvd.rank(), "of", hvd.size(), "under", os.environ["HOROVOD_CONTROLLER"], flush=True)
sys.exit(int(sys.argv[1]) if hvd.rank() == 1 else 0)
"""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    # as in an activated environment
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    environment |= variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def install(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "hvdlm", "install-horovod", *arguments, **variables)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horovod's release, fetched from the package index."""
    cache, work = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("work")
    path = fetch(cache, work, cache / "log", os.environ)
    assert path.parent == cache
    return path


@pytest.fixture
def strange_mpi(tmp_path: Path) -> str:
    """A PATH with an MPI that no wheel was built for, so that one must be built."""
    for name, text in (("mpicxx", "exit 1"), ("mpirun", "echo 'mpirun (Open MPI) 9.8.7'")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_patches_apply_to_the_release_even_inside_a_repository(archive: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    source = unpack_and_patch(archive, tmp_path, tmp_path / "log")
    for cmake in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        assert "CMAKE_CXX_STANDARD 17" in (source / cmake).read_text()
        assert "CMAKE_CXX_STANDARD 14" not in (source / cmake).read_text()
    modules = list(source.glob("horovod/runner/**/*.py"))
    assert len(modules) > 30
    for module in modules:
        imports = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any((node.module or "").startswith("distutils") for node in imports), module
    assert "'-mca" not in (source / "horovod/runner/mpi_run.py").read_text()


def test_patch_that_does_not_apply(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = tmp_path / "0099-wrong.patch"
    patch.write_text("--- a/setup.py\n+++ b/setup.py\n@@ -1 +1 @@\n-no such line\n+another\n")
    monkeypatch.setattr(source, "PATCHES", (patch,))
    with pytest.raises(HvdlmError, match=r"applying 0099-wrong.patch to Horovod 0.28.1 failed: .*setup.py.*log"):
        unpack_and_patch(archive, tmp_path, tmp_path / "log")


def test_damaged_archive_is_fetched_again(archive: Path, tmp_path: Path) -> None:
    (tmp_path / archive.name).write_bytes(archive.read_bytes()[:1000])
    work = tmp_path / "work"
    work.mkdir()
    assert fetch(tmp_path, work, tmp_path / "log", os.environ).read_bytes() == archive.read_bytes()


def test_installing_again_proves_what_is_unproven_and_then_does_nothing() -> None:
    first = install()
    assert first.returncode == 0, first.stderr
    distribution = metadata.distribution("horovod")
    assert distribution.version.startswith("0.28.1+hvdlm")
    record = Path(str(distribution.locate_file(f"horovod-{distribution.version}.dist-info"))) / "hvdlm-proof.txt"
    record.unlink()
    proving = install()
    assert proving.returncode == 0, proving.stderr
    assert "Installing" not in proving.stdout
    for line in (
        "Proven: horovodrun --check-build: PyTorch, Gloo",
        "Proven: horovodrun -np 2 --gloo: all-reduce of integers is right on every rank",
    ):
        assert line in proving.stdout
    assert record.read_text().count("\n") == proving.stdout.count("Proven: ")
    # pip removes what it lists as Horovod's, once
    assert [file.name for file in distribution.files or []].count(record.name) == 1
    again = install()
    assert again.returncode == 0, again.stderr
    assert "Installed and proven: nothing to do." in again.stdout
    assert "Proven:" not in again.stdout


def test_hostfile_is_read_as_open_mpi_reads_it(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# rack 1\n\nnode-1\nnode-2 slots=4 max_slots=8\n  10.0.0.3\tslots = 2  # slots=9\n   \n")
    assert parse_host_files(str(hostfile)) == "node-1:1,node-2:4,10.0.0.3:2"


# Without --gloo or --mpi, horovodrun takes MPI; over Gloo it turns every exit status but 0 into 1
@pytest.mark.parametrize(("controller", "options", "status"), [("gloo", ["--gloo"], 1), ("mpi", [], 7)])
def test_job_with_a_commented_hostfile_and_an_exit_status(
    controller: str, options: list[str], status: int, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# the cluster\n\nlocalhost slots=2  # both cores\n")
    command = ["horovodrun", "-np", "2", *options, "--hostfile", str(hostfile)]
    job = run(*command, sys.executable, "-c", RANK, "7")
    assert job.returncode == status, job.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 under {controller}" in job.stdout


def test_hostfile_with_wrong_slots_names_the_line(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n\nelsewhere slots=many\n")
    job = run("horovodrun", "-np", "2", "--hostfile", str(hostfile), sys.executable, "-c", RANK, "0")
    assert job.returncode != 0
    assert f"{hostfile}, line 3: slots must be a number: elsewhere slots=many" in job.stderr


def test_no_network_is_one_sentence(strange_mpi: str, tmp_path: Path) -> None:
    failed = install(HVDLM_CACHE=str(tmp_path / "cache"), PATH=strange_mpi, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert failed.returncode == 1
    assert "fetching build tools failed: pip cannot reach a package index: check the network" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "cache" / "build").exists()


def test_broken_compiler_is_one_sentence_with_the_log(strange_mpi: str, archive: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: something is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / archive.name).write_bytes(archive.read_bytes())
    failed = install(HVDLM_CACHE=str(cache), PATH=strange_mpi, CXX=str(compiler))
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "compiling Horovod failed: the compiler cannot compile the simplest program" in failed.stderr
    log = Path(failed.stderr.rpartition("(log: ")[2].rstrip(")\n"))
    assert log.parent == cache
    assert "something is broken" in log.read_text()
    assert not (cache / "build").exists()
    assert not list(cache.glob("*.whl"))
