"""The tools that compile Horovod: a C++ compiler, CMake, make, git and Python's headers."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hvdlm.cluster.versions import output_of, version_in
from hvdlm.errors import HvdlmError

OLDEST_CMAKE = (3, 13)


@dataclass(frozen=True)
class Toolchain:
    """The tools found; `cmake` is None if pip must install one for the build. `jobs`: parallel compilations."""

    compiler: str
    cmake: Path | None
    jobs: int


def find_toolchain() -> Toolchain:
    """Finds the tools. Raises HvdlmError that names the first missing one and its package."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or shutil.which(shlex.split(compiler)[0]) is None:
        raise HvdlmError(
            f"no C++ compiler ({compiler or 'c++, g++ or clang++'} is not on the PATH): install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX"
        )
    for program in ("make", "git"):
        if shutil.which(program) is None:
            raise HvdlmError(
                f"{program} is not on the PATH: install it (Debian, Ubuntu: apt install {program}; "
                f"Fedora: dnf install {program})"
            )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise HvdlmError(
            f"Python's headers are missing ({headers / 'Python.h'}): install them "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    return Toolchain(compiler, _cmake(), _jobs())


def _cmake() -> Path | None:
    """The installed CMake, if it is not too old."""
    program = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if program is None:
        return None
    version = tuple(int(part) for part in version_in(output_of(program, "--version")).split(".") if part)
    return Path(program) if version[:2] >= OLDEST_CMAKE else None


def _jobs() -> int:
    """Parallel compilations: at most 8, since each takes up to 1.5 GB; CMake's own variable overrides this."""
    wanted = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else min(len(os.sched_getaffinity(0)), 8)
