"""What a benchmark ran on: the machine, and the versions of all that takes part."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch

from common.setups import environment


def describe_machine() -> dict[str, object]:
    """Memory in bytes; `cpu` and `gpu` are the models' names."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernel": platform.release(),
    }


def describe_versions(*further: str) -> dict[str, str | None]:
    """Of what every benchmark runs on, and of further packages; None for what is not installed."""
    packages = ("hvdlm", "torch", "mpi4py", "horovod", "numpy", *further)
    said = subprocess.run(["mpirun", "--version"], env=environment(), capture_output=True, text=True).stdout
    return {
        "python": platform.python_version(),
        "mpi": said.partition("\n")[0],
        **{package: _version(package) for package in packages},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
