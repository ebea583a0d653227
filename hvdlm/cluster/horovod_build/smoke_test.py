"""Smoke test of an installed Horovod: checks what it was built with, and runs an all-reduce on two ranks.

`python -m hvdlm.cluster.horovod_build.smoke_test CONTROLLER` is one of these ranks.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hvdlm.cluster.horovod_build.command import run_logged
from hvdlm.cluster.horovod_build.target import Target
from hvdlm.errors import HvdlmError

RANKS = 2
TIMEOUT = 180.0  # seconds; PyTorch on a network file system may take long to load


def run_smoke_test(target: Target, log: Path) -> Iterator[str]:
    """Tests the installed Horovod and yields one line for each passed test.

    Raises HvdlmError for the first test that fails.
    """
    environment = dict(os.environ)
    scripts = sysconfig.get_path("scripts")
    directories = [scripts]
    if target.mpi:
        directories.insert(0, str(target.mpi.launcher.parent))
    environment["PATH"] = os.pathsep.join([*directories, environment.get("PATH", os.defpath)])
    launcher = str(Path(scripts, "horovodrun"))  # beside that MPI may be the one of another Horovod
    report = run_logged("horovodrun --check-build", [launcher, "--check-build"], log, environment, timeout=TIMEOUT)
    for feature in _expected(target):
        if not re.search(rf"\[X\] {feature}\b", report):
            raise HvdlmError(f"Horovod was built without {feature} (log: {log})")
    yield f"horovodrun --check-build: {', '.join(_expected(target))}"
    for controller in target.controllers:
        command = [launcher, "-np", str(RANKS), f"--{controller}", sys.executable, "-m", __name__, controller]
        output = run_logged(f"an all-reduce under {controller}", command, log, environment, timeout=TIMEOUT)
        for rank in range(RANKS):
            if _success(rank, controller) not in output:
                raise HvdlmError(f"an all-reduce under {controller} ended without a result of rank {rank} (log: {log})")
        yield f"horovodrun -np {RANKS} --{controller}: all-reduce of integers is right on every rank"


def _expected(target: Target) -> list[str]:
    """The features that Horovod must have been built with."""
    return ["PyTorch", "Gloo", *(["MPI"] if target.mpi else []), *(["NCCL"] if target.cuda else [])]


def _success(rank: int, controller: str) -> str:
    """The line that a rank prints after a correct all-reduce."""
    return f"rank {rank} of {RANKS} under {controller}: right"


def _rank(controller: str) -> str | None:
    """Takes part in one all-reduce as a rank; returns an error, or None if the result is right."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    running = "mpi" if hvd.mpi_built() and hvd.mpi_enabled() else "gloo"
    if running != controller or os.environ.get("HOROVOD_CONTROLLER") != controller:
        return f"asked for {controller}, but Horovod runs under {running}"
    if hvd.size() != RANKS:
        return f"asked for {RANKS} ranks, but Horovod counts {hvd.size()}"
    # NCCL needs a GPU of its own for each rank.
    on_gpu = hvd.nccl_built() and torch.cuda.device_count() >= RANKS
    device = torch.device("cuda", hvd.local_rank()) if on_gpu else torch.device("cpu")
    # Rank r contributes r + 1 times the numbers, so the sum over both ranks is 3 times the numbers.
    numbers = torch.arange(10_000, device=device)
    total = hvd.allreduce(numbers * (hvd.rank() + 1), op=hvd.Sum, name="proof")
    if not torch.equal(total, 3 * numbers):
        return f"rank {hvd.rank()} has a wrong sum under {controller}"
    print(_success(hvd.rank(), controller), flush=True)
    hvd.shutdown()
    return None


if __name__ == "__main__":
    sys.exit(_rank(sys.argv[1]))
