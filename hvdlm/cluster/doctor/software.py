"""What this Python has installed of all that the ranks of a job must have alike."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import platform
import runpy
import shutil
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import hvdlm
from hvdlm.cluster.horovod_build.target import mpi_family, output_of, version_in

# C++ classes that are compiled into Horovod's library only with the feature that they serve.
_HOROVOD_FEATURES = {"Gloo": b"GlooController", "MPI": b"MPIController", "NCCL": b"NCCLAllreduce"}


def installed_software() -> dict[str, str]:
    """Versions by name, "none" for what is missing; Horovod's with what it is built with: "0.28.1 (Gloo, MPI)".

    Neither PyTorch nor MPI is loaded: this takes milliseconds.
    """
    return {
        "Python": platform.python_version(),
        "hvdlm": hvdlm.__version__,
        "torch": _torch(),
        "Horovod": _horovod(),
        "MPI": _mpi(),
        "mpi4py": _version("mpi4py"),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch() -> str:
    folder = _folder("torch")
    return str(runpy.run_path(str(folder / "version.py"))["__version__"]) if folder else "none"


def _horovod() -> str:
    folder = _folder("horovod")
    if folder is None:
        return "none"
    version = _version("horovod").partition("+")[0]  # what follows the + names one build of the wheel
    library = folder / "torch" / f"mpi_lib_v2{EXTENSION_SUFFIXES[0]}"
    if not library.exists():
        return f"{version} (not built for PyTorch)"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        features = [feature for feature, name in _HOROVOD_FEATURES.items() if content.find(name) >= 0]
    return f"{version} ({', '.join(features)})"


def _mpi() -> str:
    """That of the mpirun on the PATH, else of the one beside this Python: the order in which launchers find it."""
    launcher = shutil.which("mpirun") or shutil.which("mpirun", path=sysconfig.get_path("scripts"))
    if launcher is None:
        return "none"
    greeting = output_of(launcher, "--version")
    return f"{mpi_family(greeting)} {version_in(greeting) or '(mpirun does not run)'}"
