"""`hvdlm doctor` under each launcher on this machine: what it says of healthy ranks and of sick ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import commands
import psutil
import pytest
from jobs import Ranks
from launcher import BIN, Result, environment, launcher_command, run
from thorough import thorough

from hvdlm.cluster.doctor.software import installed_software

DOCTOR = [str(BIN / "hvdlm"), "doctor"]


def doctor(launcher: str, ranks: int, *words: str, **extra: str) -> Result:
    return run([*launcher_command(launcher, ranks), *DOCTOR, *words], extra=extra)


def doctor_in_pool(ranks: Ranks, size: int, fault: str | None = None) -> Result:
    """On ranks of the pool, which mpirun has started."""
    answers = ranks.pool.run(Path(commands.__file__), "run_doctor", size, fault=fault)
    (status,) = {answer.value for answer in answers}
    return Result(status, "".join(answer.output for answer in answers))


def lines(result: Result, beginning: str) -> list[str]:
    """Those with `beginning`, less what horovodrun writes before them."""
    said = [re.sub(r"^\[[\d,]+\]<\w+>: ?", "", line).strip() for line in result.output.splitlines()]
    return [line for line in said if line.startswith(beginning)]


@pytest.mark.parametrize(
    ("launcher", "ranks", "engine"),
    [
        ("none", 1, "solo"),
        ("mpirun", 4, "mpi"),
        thorough("torchrun", 2, "torch"),
        ("horovodrun --gloo", 2, "horovod"),
        thorough("horovodrun --mpi", 2, "horovod"),
    ],
)
def test_healthy_ranks(launcher: str, ranks: int, engine: str) -> None:
    assert_healthy(doctor(launcher, ranks), launcher, ranks, engine)


def test_one_healthy_rank(ranks: Ranks) -> None:
    assert_healthy(doctor_in_pool(ranks, 1), "mpirun", 1, "mpi")


def assert_healthy(result: Result, launcher: str, ranks: int, engine: str) -> None:
    assert result.status == 0, result.output
    assert not re.search(r"^\[(1,)?0\]<", result.output, re.MULTILINE)  # horovodrun's, of rank 0
    name = launcher.split()[0].replace("none", "itself")
    assert lines(result, f"{ranks} rank{'s' if ranks > 1 else ''} on 1 node, started by {name}, engine {engine}")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines(result, "│")]
    who = rows[:ranks]
    assert [(row[0], row[2]) for row in who] == [(str(rank), str(rank)) for rank in range(ranks)]
    assert len(lines(result, "Python ")) == 1  # software is told once
    speeds = {row[0]: row for row in rows[ranks:]}
    expected = [] if ranks == 1 else ["within a node, ranks 0 and 1", f"all {ranks} ranks"]
    assert list(speeds) == expected
    assert lines(result, "error") == []
    crowded = ranks > len(psutil.Process().cpu_affinity())
    assert len(lines(result, "warning: ")) == crowded
    assert bool(lines(result, "nothing was found wrong")) != crowded


def test_ranks_bound_to_one_core() -> None:
    """Where there is one core only, it is no fault."""
    core = str(psutil.Process().cpu_affinity()[0])
    result = run([*launcher_command("mpirun", 2), "taskset", "-c", core, *DOCTOR])
    if psutil.cpu_count() == 1:
        assert lines(result, "error: ") == []
        return
    assert result.status == 1
    (said,) = lines(result, "error: ")
    assert re.fullmatch(
        rf"error: ranks 0-1 on \S+ are bound to 1 core \({core}\) of \d+: start mpirun with --bind-to none", said
    )


def test_mixed_versions(ranks: Ranks) -> None:
    result = doctor_in_pool(ranks, 2, fault="version")
    assert result.status == 1
    (said,) = lines(result, "error: ")
    assert re.search(r"ranks differ in hvdlm: \S+ on rank 0 on \S+; 0.0.1 on rank 1 on \S+: install one version", said)
    assert len(lines(result, "rank 0 on ")) == len(lines(result, "rank 1 on ")) == 1  # what each has, in full


def test_a_wrong_sum(ranks: Ranks) -> None:
    result = doctor_in_pool(ranks, 2, fault="sum")
    assert result.status == 1
    said = lines(result, "error: ")
    # engine mpi sums half-precision numbers as float32, so they are spoilt too
    kinds = [f"the all-reduce of {dtype} of 65537 elements" for dtype in ("bfloat16", "float16", "float32")]
    assert [line.removeprefix("error: ").split(" gave")[0] for line in said] == kinds
    assert all(re.search(r"gave a wrong sum to rank 1 on \S+: do not train with engine mpi", line) for line in said)


def test_an_interface_that_is_not_there() -> None:
    result = doctor("torchrun", 2, GLOO_SOCKET_IFNAME="eth99")
    assert result.status != 0
    said = lines(result, "hvdlm: error: rank ")
    assert (
        said and "GLOO_SOCKET_IFNAME=eth99 names no interface of" in said[0] and "unset GLOO_SOCKET_IFNAME" in said[0]
    )


def test_each_process_takes_itself_for_rank_0(tmp_path: Path) -> None:
    """A starter of another MPI, by its name, and nothing in the environment that says so."""
    starter = tmp_path / "hydra_pmi_proxy"
    starter.write_text('#!/bin/sh\n"$@" &\n"$@"\nstatus=$?\nwait\nexit $status\n')
    starter.chmod(0o755)
    result = run([str(starter), *DOCTOR])
    assert result.status == 1
    said = lines(result, "error: hydra_pmi_proxy started this process on ")
    assert said
    assert "as do 1 more: each takes itself for rank 0" in said[0] and "the mpirun of Open MPI" in said[0]


def test_a_rank_that_never_comes() -> None:
    """The others end in time, with a sentence, and so does the job."""
    words = ["sh", "-c", f'[ "$RANK" = 1 ] && exec sleep 100; exec {DOCTOR[0]} doctor --timeout 3']
    result = run([*launcher_command("torchrun", 2), *words], deadline=60)
    assert result.status == 1
    assert re.search(r"hvdlm: error: rank 0 on \S+ cannot start engine torch: ", result.output), result.output


def test_installed_software() -> None:
    import mpi4py
    import torch

    software = installed_software()
    assert list(software) == ["Python", "hvdlm", "torch", "Horovod", "MPI", "mpi4py"]
    assert software["torch"] == torch.__version__
    assert software["mpi4py"] == mpi4py.__version__
    assert software["MPI"].split()[-1] in subprocess.check_output(["mpirun", "--version"], text=True, env=environment())
    check = subprocess.check_output(["horovodrun", "--check-build"], text=True, env=environment())
    built = [name for name in ("Gloo", "MPI", "NCCL") if f"[X] {name}" in check]
    assert software["Horovod"].endswith(f"({', '.join(built)})")
