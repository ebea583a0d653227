"""Versions of the software that must be the same on all ranks of a job, as installed for this Python."""

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
from hvdlm.cluster.versions import mpi_family, output_of, version_in

# Names of C++ classes that Horovod's library contains only if it is built with the feature.
_HOROVOD_FEATURES = {"Gloo": b"GlooController", "MPI": b"MPIController", "NCCL": b"NCCLAllreduce"}


def installed_software() -> dict[str, str]:
    """Versions by name, "none" for what is missing. Horovod's includes its features, as in "0.28.1 (Gloo, MPI)".

    Neither PyTorch nor MPI is loaded, so this takes milliseconds.
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
    version = _version("horovod").partition("+")[0]  # after the + comes the build of the wheel
    library = folder / "torch" / f"mpi_lib_v2{EXTENSION_SUFFIXES[0]}"
    if not library.exists():
        return f"{version} (not built for PyTorch)"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        features = [feature for feature, name in _HOROVOD_FEATURES.items() if content.find(name) >= 0]
    return f"{version} ({', '.join(features)})"


def _mpi() -> str:
    """The version of the mpirun on the PATH, or else of the one beside this Python: the order of the launchers."""
    launcher = shutil.which("mpirun") or shutil.which("mpirun", path=sysconfig.get_path("scripts"))
    if launcher is None:
        return "none"
    text = output_of(launcher, "--version")
    return f"{mpi_family(text)} {version_in(text) or '(mpirun does not run)'}"
