"""`hvdlm install-horovod`: builds Horovod for this PyTorch and MPI, caches the wheel, installs it and tests it."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from hvdlm.cluster.horovod_build.command import run_logged
from hvdlm.cluster.horovod_build.smoke_test import run_smoke_test
from hvdlm.cluster.horovod_build.source import VERSION, fetch, patches_sha256, unpack_and_patch
from hvdlm.cluster.horovod_build.target import Target, find_target
from hvdlm.cluster.horovod_build.toolchain import Toolchain, find_toolchain
from hvdlm.cluster.horovod_build.wheel_cache import build_directory, cached_wheel, open_cache
from hvdlm.errors import HvdlmError

# Imported by Horovod's setup.py. They are installed in the build directory, not in the user's environment.
BUILD_REQUIREMENTS = ("setuptools<81", "wheel", "packaging", "cffi", "cloudpickle", "psutil", "pyyaml")


def install(dry_run: bool) -> None:
    """Installs a working Horovod in the running Python environment and prints each step.

    The version of the wheel contains a hash of what it was built for. So a Horovod that fits is recognised by its
    version, and the wheel of another PyTorch or MPI is not used. `dry_run`: only print the plan.

    Raises HvdlmError if something is missing, the disk is full or read-only, or the build or the smoke test fails.
    """
    target = find_target()
    version = f"{VERSION}+hvdlm{target.key(VERSION, patches_sha256())}"
    cache = open_cache()
    log = cache / f"horovod-{version}.log"
    wheel = cached_wheel(cache, version)
    present = _installed_version() == version and _imports()
    proven = present and _proof_file(version).exists()

    print(_description(target, version), flush=True)
    if proven:
        print("Installed and proven: nothing to do.")
        return
    toolchain = None if present or wheel else find_toolchain()
    if toolchain:
        print(f"Will build with {toolchain.compiler}, {toolchain.cmake or 'CMake from pip'}, {toolchain.jobs} at once.")
    if dry_run:
        steps = "build a wheel, install it, " if toolchain else "" if present else "install the cached wheel, "
        print(f"To do: {steps}prove it.")
        return

    try:
        if toolchain:
            wheel = _build(target, toolchain, version, cache, log)
        if wheel and not present:
            _install(wheel, version, log)
        proof = []
        for line in run_smoke_test(target, log):
            print(f"Proven: {line}", flush=True)
            proof.append(line)
        _save_proof(version, proof)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise HvdlmError(f"the disk of {cache} is full: free some space, or set HVDLM_CACHE to another disk") from None
    print(f"Horovod {version} is ready.")


def _description(target: Target, version: str) -> str:
    """What is built for what, as printed at the start."""
    mpi, cuda = target.mpi, target.cuda
    lines = {
        "Horovod": version,
        "Python": f"{target.python}, {sys.executable}",
        "PyTorch": target.torch,
        "MPI": f"{mpi.family} {mpi.version}, {mpi.compiler}" if mpi else "none (no mpicxx): Gloo only",
        "GPU": f"CUDA {cuda.version}, {cuda.home}; NCCL {cuda.nccl_version}" if cuda else f"none: {target.note}",
    }
    return "\n".join(f"{name:<9}{value}" for name, value in lines.items())


def _build(target: Target, toolchain: Toolchain, version: str, cache: Path, log: Path) -> Path:
    """Compiles the wheel in a temporary directory and moves it into the cache when it is complete."""
    with build_directory(cache) as work:
        wheel = cached_wheel(cache, version)
        if wheel:  # built by another process while this one waited
            return wheel
        log.unlink(missing_ok=True)
        tools, temporary = work / "tools", work / "tmp"
        temporary.mkdir()
        environment = _build_environment(tools, temporary)
        pip = (sys.executable, "-m", "pip")
        print("Fetching Horovod's source and build tools ...", flush=True)
        requirements = [*BUILD_REQUIREMENTS, *([] if toolchain.cmake else ["cmake"])]
        command = [*pip, "install", "--quiet", "--target", str(tools), *requirements]
        run_logged("fetching build tools", command, log, environment)
        source = unpack_and_patch(fetch(cache, work, log, environment), work, log)
        print(f"Compiling; this takes 2 to 5 minutes (log: {log}) ...", flush=True)
        environment |= _horovod_settings(target, toolchain, version, work)
        command = [
            *pip,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--verbose",
            "--wheel-dir",
            str(work),
            str(source),
        ]
        run_logged("compiling Horovod", command, log, environment)
        built = next(work.glob("*.whl"))
        return built.replace(cache / built.name)


def _build_environment(tools: Path, temporary: Path) -> dict[str, str]:
    """The environment variables of the build: with the build tools, without settings of `make` or of Horovod."""
    removed = ("HOROVOD_", "MAKE", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tools), environment.get("PYTHONPATH")]))
    environment["TMPDIR"] = str(temporary)
    return environment


def _horovod_settings(target: Target, toolchain: Toolchain, version: str, work: Path) -> dict[str, str]:
    """The environment variables that configure Horovod's build."""
    settings = {
        "CXX": toolchain.compiler,
        "HOROVOD_CMAKE": str(toolchain.cmake or work / "tools" / "bin" / "cmake"),
        "HOROVOD_LOCAL_VERSION": version.partition("+")[2],
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if target.mpi else "HOROVOD_WITHOUT_MPI": "1",
        "MAKEFLAGS": f"-j{toolchain.jobs}",
    }
    if target.mpi:
        settings["PATH"] = os.pathsep.join([str(target.mpi.compiler.parent), os.environ.get("PATH", os.defpath)])
        if target.mpi.in_environment:
            package = Path(sysconfig.get_path("platlib"), "horovod", "torch")
            settings["HOROVOD_BUILD_RPATH"] = f"$ORIGIN/{os.path.relpath(Path(sys.prefix, 'lib'), package)}"
    if target.cuda:
        # The NCCL wheel has only libnccl.so.2, but linkers look for libnccl.so.
        link = work / "nccl" / "libnccl.so"
        link.parent.mkdir()
        link.symlink_to(target.cuda.nccl_library)
        settings |= {
            "CUDA_HOME": str(target.cuda.home),
            "HOROVOD_CUDA_HOME": str(target.cuda.home),
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_INCLUDE": str(target.cuda.nccl_include),
            "HOROVOD_NCCL_LIB": str(link.parent),
            "HOROVOD_NCCL_LINK": "SHARED",
        }
    return settings


def _install(wheel: Path, version: str, log: Path) -> None:
    print(f"Installing {wheel} ...", flush=True)
    # If this version is installed but cannot be imported, it is damaged; pip would not replace it by itself.
    repair = ["--force-reinstall", "--no-deps"] if _installed_version() == version else []
    command = [sys.executable, "-m", "pip", "install", "--quiet", *repair, str(wheel)]
    run_logged("installing Horovod", command, log, os.environ)
    importlib.invalidate_caches()


def _installed_version() -> str | None:
    try:
        return metadata.version("horovod")
    except metadata.PackageNotFoundError:
        return None


def _imports() -> bool:
    """Whether Horovod can be imported; tried in a child process, which an incompatible library may crash."""
    return subprocess.run([sys.executable, "-c", "import horovod.torch"], capture_output=True).returncode == 0


def _proof_file(version: str) -> Path:
    """The file with the results of the smoke test. It is in Horovod's metadata, so it belongs to the environment."""
    return Path(str(metadata.distribution("horovod").locate_file(f"horovod-{version}.dist-info"))) / "hvdlm-proof.txt"


def _save_proof(version: str, proof: list[str]) -> None:
    """Writes the file and lists it in Horovod's RECORD, so that pip uninstalls it too.

    If the file stayed, so would the directory of metadata, and Horovod would seem to be installed.
    """
    file = _proof_file(version)
    file.write_text("\n".join(proof) + "\n")
    record = file.with_name("RECORD")
    entry = f"{file.parent.name}/{file.name},,"
    if entry not in record.read_text().splitlines():
        with record.open("a") as files:
            files.write(f"{entry}\n")
