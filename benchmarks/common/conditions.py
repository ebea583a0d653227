"""The conditions of a benchmark, which are recorded beside its figures: date, machine, versions and settings."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from common.processes import environment
from hvdlm.config import Config


def describe_run(*packages: str) -> dict[str, Any]:
    """Today's date, this machine, and the versions of what every benchmark uses and of further `packages`."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": describe_versions(*packages),
    }


def describe_settings(config: Config, *left_out: str) -> dict[str, Any]:
    """The settings by section, without paths, which differ between machines, and without those of `train` that are
    `left_out`."""
    return config.model_dump(mode="json", exclude={"data": {"path"}, "train": {"run_dir", *left_out}})


def describe_machine() -> dict[str, object]:
    """`cpu` and `gpu` are names of models, `memory` is in bytes."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernel": platform.release(),
    }


def describe_versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, MPI, hvdlm and its main packages, and of further `packages`; None: not installed."""
    all_packages = ("hvdlm", "torch", "mpi4py", "horovod", "numpy", *packages)
    said = subprocess.run(["mpirun", "--version"], env=environment(), capture_output=True, text=True).stdout
    return {
        "python": platform.python_version(),
        "mpi": said.partition("\n")[0],
        **{package: _version(package) for package in all_packages},
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
