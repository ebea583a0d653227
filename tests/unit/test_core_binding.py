"""What binds ranks to cores, or says how many threads they have, without their users' knowing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from thread_rank import on_threads

import hvdlm
from hvdlm.comm import core_binding
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.core_binding import Binding, drop_unchosen_threads, idle_cores, release_cores, same_cores
from hvdlm.training.hardware import share_cores

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 16 cores, no variable that says anything of threads or launchers, and no quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(hvdlm, "AFFINITY_AT_START", frozenset(range(16)))
    for name in (*TORCHRUN, "OMP_NUM_THREADS", *core_binding._BINDING_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def shared_by_two() -> list[int]:
    """The threads of each of two ranks of one host."""

    def body(communicator: Communicator) -> int:
        communicator.hosts = ["n1", "n1"]
        return share_cores(0, communicator)

    return on_threads(2, body)


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(
    ("variables", "threads", "remark"),
    [
        ({}, 8, None),
        ({"OMP_NUM_THREADS": ""}, 8, None),
        ({"OMP_NUM_THREADS": "1", **TORCHRUN}, 8, "torchrun has set OMP_NUM_THREADS=1, as nobody else had"),
        ({"OMP_NUM_THREADS": "abc"}, 8, "OMP_NUM_THREADS = 'abc' is no number of threads"),
        ({"OMP_NUM_THREADS": "0"}, 8, "OMP_NUM_THREADS = '0' is no number of threads"),
        ({"OMP_NUM_THREADS": "-1"}, 8, "OMP_NUM_THREADS = '-1' is no number of threads"),
        ({"OMP_NUM_THREADS": "2.5"}, 8, "OMP_NUM_THREADS = '2.5' is no number of threads"),
        ({"OMP_NUM_THREADS": ",4"}, 8, "OMP_NUM_THREADS = ',4' is no number of threads"),
    ],
)
def test_cores_are_shared_where_nobody_has_chosen(
    variables: dict[str, str],
    threads: int,
    remark: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert shared_by_two() == [threads, threads]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (remark is not None)
    assert remark is None or said[0].startswith(remark)


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "3"},
        {"OMP_NUM_THREADS": " 3 "},
        {"OMP_NUM_THREADS": "3,2"},  # two levels of teams
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", **TORCHRUN},
        {"OMP_NUM_THREADS": "1", **TORCHRUN, "LOCAL_WORLD_SIZE": "1"},  # torchrun sets it for several ranks only
    ],
)
def test_what_was_chosen_stays(variables: dict[str, str]) -> None:
    environment = dict(variables)
    assert drop_unchosen_threads(environment) == ""
    assert environment == variables


def test_cores_that_openmp_took_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """To all threads of the process; without such a variable somebody else has meant it."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("this host has one core")
    monkeypatch.setattr(hvdlm, "AFFINITY_AT_START", frozenset(mine))
    threads = [thread.id for thread in psutil.Process().threads()]
    before = {thread: os.sched_getaffinity(thread) for thread in threads}
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {min(mine)})
        assert release_cores({}) == ""
        assert os.sched_getaffinity(0) == {min(mine)}
        assert (
            release_cores({"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}) == "OMP_PROC_BIND=true and OMP_PLACES=cores"
        )
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset(mine)}
        assert release_cores({"OMP_PROC_BIND": "true"}) == ""  # nothing is bound any more
    finally:
        for thread, cpus in before.items():
            os.sched_setaffinity(thread, cpus)


def test_pytorch_under_omp_proc_bind() -> None:
    """What GNU's OpenMP does when PyTorch is imported, and that hvdlm has looked before."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this host has one core")
    script = (
        "import os, hvdlm, torch\n"
        "from hvdlm.comm.core_binding import release_cores\n"
        "print(len(os.sched_getaffinity(0)), release_cores(os.environ), len(os.sched_getaffinity(0)))\n"
    )
    environment = {**os.environ, "OMP_PROC_BIND": "true", "PYTHONPATH": str(Path(hvdlm.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"1 OMP_PROC_BIND=true {len(os.sched_getaffinity(0))}\n", done.stderr


def binding(
    cpus: set[int], launcher: str = "prterun", there: int = 64, host: str = "n1", bound_by: str = ""
) -> Binding:
    return Binding(host, frozenset(cpus), frozenset(cpus), launcher, there, bound_by, "")


UNBIND_MPIRUN = "start mpirun with --bind-to none"
UNBIND_SRUN = "start srun with --cpu-bind=none, or give each task cores with --cpus-per-task"
EVERY = set(range(64))


@pytest.mark.parametrize(
    ("ranks", "sentences"),
    [
        ([binding({0})], [f"1 rank on n1 may use 1 of its 64 cores: {UNBIND_MPIRUN}"]),
        ([binding({0}), binding({1})], [f"2 ranks on n1 may use 2 of its 64 cores: {UNBIND_MPIRUN}"]),
        ([binding({0}), binding({0})], [f"2 ranks on n1 may use 1 of its 64 cores: {UNBIND_MPIRUN}"]),
        (
            [binding({0}, host="n1"), binding({0}, host="n2"), binding({0}, host="n3")],
            [f"1 rank on n1 may use 1 of its 64 cores, and so it is on 2 more hosts: {UNBIND_MPIRUN}"],
        ),
        (
            [binding(EVERY), binding({0}, host="n2", there=4, launcher="slurmstepd")],
            [f"1 rank on n2 may use 1 of its 4 cores: {UNBIND_SRUN}"],
        ),
        ([binding({0}, there=1)], []),
        ([binding(EVERY), binding(EVERY)], []),
        ([binding(set(range(32))), binding(set(range(32, 64)))], []),  # each socket a rank
        ([binding({0}, launcher="", there=0)], []),  # by taskset: its user knows
        (
            [binding(EVERY, bound_by="OMP_PROC_BIND=true and OMP_PLACES=cores")] * 2,
            [
                "OMP_PROC_BIND=true and OMP_PLACES=cores binds threads of all ranks on n1 to the same cores: "
                "unset OMP_PROC_BIND and OMP_PLACES"
            ],
        ),
        # threads of one rank alone are bound to different cores
        ([binding(EVERY, bound_by="OMP_PROC_BIND=true"), binding(EVERY, bound_by="OMP_PROC_BIND=true", host="n2")], []),
    ],
)
def test_one_sentence_for_what_binds(ranks: list[Binding], sentences: list[str]) -> None:
    assert [f"{what}: {remedy}" for what, remedy in same_cores(ranks) + idle_cores(ranks)] == sentences


def test_two_cpus_of_one_core_are_one_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the kernel writes it; where it writes nothing each CPU counts as a core."""
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3", "4-5", "4-5"]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(core_binding, "_CPUS", tmp_path)
    assert core_binding._cores(frozenset({0, 2, 3})) == {0, 1}
    assert core_binding._cores(frozenset({5, 4, 9})) == {4, 9}


class Ancestor:
    """A process that has started this one."""

    def __init__(self, name: str, cpus: list[int]) -> None:
        self._name, self._cpus = name, cpus

    def name(self) -> str:
        return self._name

    def cpu_affinity(self) -> list[int]:
        return self._cpus


@pytest.mark.parametrize(
    ("names", "allocated", "expected"),
    [
        (["prterun"], None, ("prterun", 64)),
        (["torchrun", "slurmstepd"], "8", ("slurmstepd", 8)),  # torchrun binds nothing
        (["slurmstepd"], "8", ("slurmstepd", 8)),
        (["slurmstepd"], "4000", ("slurmstepd", 64)),  # a node that Slurm believes to be larger than it is
        (["slurmstepd"], None, ("slurmstepd", 0)),
        (["prted", "slurmstepd"], "8", ("prted", 64)),
        (["horovodrun"], "8", ("", 0)),
        ([], "8", ("", 0)),
    ],
)
def test_whom_a_rank_was_started_by(
    names: list[str],
    allocated: str | None,
    expected: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(core_binding, "_CPUS", tmp_path)  # each CPU is a core
    launchers = [Ancestor(name, list(range(64))) for name in names]
    monkeypatch.setattr(core_binding, "launcher_processes", lambda: launchers)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if allocated is not None:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", allocated)
    assert core_binding._launcher() == expected


@pytest.mark.usefixtures("sixteen_cores")
def test_rank_0_warns_of_cores_without_work(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(core_binding, "_launcher", lambda: ("prterun", 64))
    monkeypatch.setattr(core_binding, "_cores", lambda cpus: frozenset(cpus))
    with caplog.at_level(logging.WARNING):
        shared_by_two()
    assert [record.getMessage() for record in caplog.records] == [
        f"2 ranks on n1 may use 16 of its 64 cores: {UNBIND_MPIRUN}"
    ]
