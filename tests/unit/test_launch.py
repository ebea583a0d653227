"""How a process was started, which engine serves it, and whether all ranks belong together."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from hvdlm.comm import connect as connecting
from hvdlm.comm import launch
from hvdlm.comm.agreement import check_ranks_match
from hvdlm.comm.connect import choose_engine, connect
from hvdlm.comm.launch import Launch, detect
from hvdlm.comm.rendezvous import slurm_endpoint
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.errors import HvdlmError, JobError

MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
INTEL_OR_MPICH = {"PMI_RANK": "2", "PMI_SIZE": "6"}
HOROVODRUN = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_CONTROLLER": "gloo"}
# A batch script is process 0 of a step of its own, whose size Slurm does not tell; srun's steps have one.
SBATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}
SRUN = {**SBATCH, "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"}
FLUX = {"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "0"}
JSRUN = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "12", "PMIX_RANK": "3"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}
# As prterun 3 sets them, and Slurm's PMIx
PRTERUN = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-417@1"}
SRUN_PMIX = {"PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.77.0"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("none", 0, 1)),
        ({"PATH": "/bin", "RANK": "7"}, Launch("none", 0, 1)),
        (SBATCH, Launch("none", 0, 1)),
        (MPIRUN, Launch("mpirun", 3, 4)),
        (INTEL_OR_MPICH, Launch("mpirun", 2, 6)),
        (HOROVODRUN, Launch("horovodrun", 1, 2)),
        (SRUN, Launch("srun", 5, 8)),
        (TORCHRUN, Launch("torchrun", 1, 3)),
        (FLUX, Launch("flux", 2, 4)),
        (JSRUN, Launch("jsrun", 3, 12)),
        (MVAPICH, Launch("mpirun", 1, 2)),
    ],
)
def test_each_launcher_is_known_by_its_variables(environment: dict[str, str], expected: Launch) -> None:
    assert detect(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SBATCH | MPIRUN, Launch("mpirun", 3, 4)),
        # mpirun starts its daemons with srun, which leaves the daemon's own place in the environment of ranks.
        (SRUN | MPIRUN, Launch("mpirun", 3, 4)),
        (SRUN | INTEL_OR_MPICH, Launch("mpirun", 2, 6)),
        (SRUN | HOROVODRUN, Launch("horovodrun", 1, 2)),
        # horovodrun over MPI leaves the numbers to mpirun and says only that it was there.
        (MPIRUN | {"HOROVOD_CONTROLLER": "mpi"}, Launch("horovodrun", 3, 4)),
        (SBATCH | MPIRUN | {"HOROVOD_CONTROLLER": "mpi"}, Launch("horovodrun", 3, 4)),
        # Many a job script exports these for other tools.
        (SRUN | TORCHRUN, Launch("srun", 5, 8)),
        (MPIRUN | TORCHRUN, Launch("mpirun", 3, 4)),
        (SRUN | SRUN_PMIX, Launch("srun", 5, 8)),
        (SRUN | PRTERUN | MPIRUN, Launch("mpirun", 3, 4)),
    ],
)
def test_of_several_launchers_the_one_that_started_this_process_counts(
    environment: dict[str, str], expected: Launch
) -> None:
    assert detect(environment) == expected
    assert detect(dict(reversed(environment.items()))) == expected


@pytest.mark.parametrize("outside", [{}, SBATCH, SRUN])
@pytest.mark.parametrize(
    "environment",
    [
        PRTERUN,
        {"PALS_RANKID": "3", "PALS_NODEID": "1"},
        {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {"MV2_COMM_WORLD_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_a_rank_that_is_not_told_of_how_many_does_not_train_alone(
    environment: dict[str, str], outside: dict[str, str]
) -> None:
    """prterun leaves the variables of the Slurm step in which it runs; for the others there is no such step."""
    if outside is SRUN and environment is not PRTERUN:
        return
    name = next(iter(environment))
    with pytest.raises(HvdlmError) as caught:
        detect(outside | environment)
    assert str(caught.value) == (
        f"{name}={environment[name]} says that a launcher started this process as one of several ranks, but not of how "
        "many: start them with mpirun, horovodrun, srun or torchrun, or unset it to train alone"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("HOROVOD_RANK", "HOROVOD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ],
)
@pytest.mark.parametrize(
    ("rank", "size"),
    [("", ""), ("a", "2"), ("0", ""), ("2", "2"), ("-1", "2"), ("0", "0"), ("1.5", "2"), ("1_0", "20"), ("٣", "4")],
)
def test_what_is_no_rank_is_named_with_its_variables(names: tuple[str, str], rank: str, size: str) -> None:
    with pytest.raises(HvdlmError) as caught:
        detect(dict(zip(names, (rank, size), strict=True)))
    assert str(caught.value).startswith(f"{names[0]}={rank} and {names[1]}={size} are no rank and number of ranks: ")


@pytest.mark.parametrize(
    ("launcher", "gpu", "nccl", "engine"),
    [
        ("none", False, False, "solo"),
        ("none", True, True, "solo"),
        ("horovodrun", False, False, "horovod"),
        ("horovodrun", True, False, "horovod"),
        ("torchrun", False, False, "torch"),
        ("torchrun", True, True, "torch"),
        ("mpirun", False, True, "mpi"),
        ("mpirun", True, True, "horovod"),
        ("mpirun", True, False, "torch"),
        ("srun", False, False, "mpi"),
        ("srun", True, True, "horovod"),
        ("srun", True, False, "torch"),
    ],
)
def test_auto_chooses_by_launcher_and_device(
    monkeypatch: pytest.MonkeyPatch, launcher: str, gpu: bool, nccl: bool, engine: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(connecting, "_horovod_has_nccl", lambda: nccl)
    chosen, reason = choose_engine(Launch(launcher, 0, 2), "auto")
    assert chosen == engine
    assert ("no launcher" if launcher == "none" else f"{launcher} started this job") in reason


@pytest.mark.parametrize("engine", ["solo", "horovod", "mpi", "torch"])
def test_a_requested_engine_is_taken(engine: str) -> None:
    assert choose_engine(Launch("mpirun", 0, 2), engine) == (engine, "comm.engine says so")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("n[03-10,12]", "n03"),
        ("n[7,9-11]", "n7"),
        ("gpu-a[1-2],b7", "gpu-a1"),
        ("login.cluster-2", "login.cluster-2"),
        ("b7,gpu-a[1-2]", "b7"),
        ("b7,b9,gpu[001-002]", "b7"),
        ("n[2-3]-ib,x", "n2-ib"),
        ("rack[1-2]n[05-08]", "rack1n05"),
    ],
)
def test_rank_0_of_a_slurm_step_is_on_its_first_node(nodes: str, first: str) -> None:
    address, port = slurm_endpoint({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"})
    assert address == first
    assert 1024 <= port < 32768  # below what Linux gives to outgoing connections


def test_concurrent_steps_have_different_ports() -> None:
    ports = {
        slurm_endpoint({"SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[1]
        for job in range(1000, 1020)
        for step in range(8)
    }
    assert len(ports) == 20 * 8


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*launch._RANKS_WITHOUT_SIZE, *(name for names in launch._VARIABLES for name in names[1:])]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_a_process_by_itself_connects_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="hvdlm"):
        communicator = connect("auto", timeout=1)
    assert (communicator.engine, communicator.rank, communicator.size) == ("solo", 0, 1)
    assert "engine solo, because no launcher started this process" in caplog.text


@pytest.mark.usefixtures("alone")
def test_a_rank_that_finds_itself_in_another_job_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(HvdlmError) as caught:
        connect("solo", timeout=1)
    assert str(caught.value) == (
        f"mpirun started 4 ranks and this is rank 1 on {socket.gethostname()}, but engine solo sees 1 and takes itself "
        "for rank 0: leave comm.engine at auto, or start one process"
    )


@pytest.mark.usefixtures("alone")
def test_a_missing_horovod_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match="Horovod, which is not installed: run `hvdlm install-horovod`"):
        connect("horovod", timeout=1)


class RankOf(SoloCommunicator):
    """Rank 0 of several; what the others say is a change of what it says itself."""

    def __init__(self, *others: Callable[[Any], Any]) -> None:
        self.others = others
        self.rank = 0
        self.size = 1 + len(others)
        self.hosts = [f"n{rank}" for rank in range(self.size)]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, *(other(value) for other in self.others)]


def differing(**values: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda own: {**own, **values}


def test_ranks_that_are_alike_may_go_on() -> None:
    same = differing()
    check_ranks_match(SoloCommunicator(), "d" * 64)
    check_ranks_match(RankOf(same, same), "d" * 64)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            [differing(), differing(torch="2.0.1"), differing(torch="1.13")],
            r"ranks differ in torch: rank 0 on n0 has \S+, rank 2 on n2 has 2.0.1, rank 3 on n3 has 1.13; install one",
        ),
        (
            [differing(Python="3.10.1")],
            r"ranks differ in Python: .*rank 1 on n1 has 3.10.1; install one version on all",
        ),
        ([differing(hvdlm="9")], r"ranks differ in hvdlm: .*rank 1 on n1 has 9; install one version on all hosts"),
        (
            [differing(settings="abc")],
            r"ranks differ in settings: rank 0 on n0 has d{12}, rank 1 on n1 has abc; give all ranks the same config",
        ),
        ([differing(torch="1")] * 20, r"rank 8 on n8 has 1 and so on; install"),
    ],
)
def test_ranks_that_differ_are_named(others: list[Callable[[Any], Any]], sentence: str) -> None:
    with pytest.raises(JobError) as caught:
        check_ranks_match(RankOf(*others), "d" * 64)
    assert re.search(sentence, str(caught.value))
