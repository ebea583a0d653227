"""The system programs that a fabric needs: finds and runs them, and names the packages of missing ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvdlm.errors import HvdlmError

_PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
_SLURM_PACKAGES = dict.fromkeys(("munged", "slurmctld", "slurmd", "srun", "sbatch"), "slurm-wlm")

# Daemons are in directories that are not on an ordinary user's PATH.
_DIRECTORIES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def require(slurm: bool) -> None:
    """Raises HvdlmError, with what to install, if a fabric cannot run on this machine; `slurm`: a fabric with Slurm."""
    if os.geteuid() != 0:
        raise HvdlmError(
            "hvdlm fabric makes network namespaces, which only root may do: run it as root, or in a virtual machine"
        )
    packages = _PACKAGES | (_SLURM_PACKAGES if slurm else {})
    missing = [name for name in packages if shutil.which(name, path=_DIRECTORIES) is None]
    if slurm and not any(Path("/usr").glob("lib*/libpmix.so")) and not any(Path("/usr/lib").glob("*/libpmix.so")):
        packages["libpmix.so"] = "libpmix-dev"  # `srun --mpi=pmix` opens it by that name
        missing.append("libpmix.so")
    if missing:
        wanted = " ".join(sorted({packages[name] for name in missing}))
        raise HvdlmError(
            f"hvdlm fabric needs {', '.join(missing)}: install them (Debian, Ubuntu: apt-get install {wanted})"
        )


def path_of(name: str) -> str:
    """The absolute path of a program; sshd requires to be started by it."""
    path = shutil.which(name, path=_DIRECTORIES)
    if path is None:
        raise HvdlmError(f"{name} is not on the PATH")
    return path


def run(*command: str) -> str:
    """Runs a command and returns its output; raises HvdlmError with the output if it fails."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        reason = " ".join(result.stdout.split()) or f"exit status {result.returncode}"
        raise HvdlmError(f"{' '.join(command)}: {reason}")
    return result.stdout


def nsenter(process: int, namespaces: Sequence[str]) -> list[str]:
    """The prefix of a command that runs it in namespaces ("net", "uts", ...) of a process."""
    return ["nsenter", "--target", str(process), *(f"--{namespace}" for namespace in namespaces), "--"]
