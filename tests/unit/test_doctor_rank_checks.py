"""The checks of `hvdlm doctor` on made-up reports of ranks: CPU hosts, GPU clusters, two networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from ipaddress import IPv4Interface
from typing import Any

import pytest

from hvdlm.cluster.doctor.examine_ranks import exchange_sentence
from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.interface_variables import interface_variables
from hvdlm.cluster.doctor.rank_checks import (
    alone_under_a_launcher,
    check_ranks,
    crowded_cores,
    different_gpus,
    different_instructions,
    different_software,
    little_shared_memory,
    name_ranks,
    number_ranges,
    slow_networks,
    uncompiled_codecs,
    unsupported_gpus,
    wrong_interface_variables,
)
from hvdlm.cluster.doctor.rank_report import RankReport
from hvdlm.comm.core_binding import Binding
from hvdlm.comm.interfaces import Interface

GIB = 2**30
SOFTWARE = {"Python": "3.11.7", "torch": "2.13.0", "Horovod": "0.28.1 (Gloo, MPI)", "MPI": "Open MPI 5.0.11"}
ETHERNET, FABRIC, DOCKER = "eth0", "ib0", "docker0"


def interface(name: str, host: int) -> Interface:
    address, speed = {
        ETHERNET: (f"10.0.0.{host}/24", 1000),
        FABRIC: (f"10.1.0.{host}/24", 100_000),
        DOCKER: ("172.17.0.1/16", None),
    }[name]
    return Interface(name, IPv4Interface(address), speed)


def binding(host: int, cores: Iterable[int], bound_by: str = "") -> Binding:
    """Of a rank of mpirun's on a host with 16 cores of one CPU each."""
    return Binding(f"n{host}", frozenset(cores), frozenset(cores), "prterun", 16, bound_by, "")


def cluster(hosts: int, ranks_per_host: int, *names: str, gpus: int = 0, **changes: Any) -> list[RankReport]:
    """Ranks with nothing wrong: 16 cores a host, `gpus` A100s, the networks of `names`; `changes` on all of them."""
    reports = [
        RankReport(
            rank=host * ranks_per_host + local_rank,
            host=f"n{host + 1}",
            local_rank=local_rank,
            launcher="mpirun",
            engine="mpi",
            gpus=("A100",) * gpus,
            gpu_uuids=tuple(f"GPU-{host}-{number}" for number in range(gpus)),
            supports_gpus=bool(gpus),
            cores=frozenset(range(16)),
            launcher_cores=frozenset(range(16)),
            software=SOFTWARE,
            interfaces=tuple(interface(name, host + 1) for name in names or (ETHERNET,)),
            towards_next_node=interface(ETHERNET, host + 1) if hosts > 1 else None,
            variables={},
            shared_memory=32 * GIB,
            parent="prterun",
            siblings=ranks_per_host,
            binding=binding(host + 1, range(16)),
        )
        for host in range(hosts)
        for local_rank in range(ranks_per_host)
    ]
    return [dataclasses.replace(each, **changes) for each in reports]


def changed(reports: list[RankReport], ranks: set[int], **changes: Any) -> list[RankReport]:
    return [dataclasses.replace(each, **changes) if each.rank in ranks else each for each in reports]


@pytest.mark.parametrize(
    "reports",
    [cluster(1, 1), cluster(1, 4), cluster(2, 4), cluster(2, 4, ETHERNET, DOCKER), cluster(8, 8, gpus=8)],
    ids=["alone", "one host", "two hosts", "docker0", "64 GPUs"],
)
def test_nothing_is_wrong(reports: list[RankReport]) -> None:
    assert check_ranks(reports) == []


def test_ranks_bound_to_one_core() -> None:
    (finding,) = crowded_cores(cluster(1, 4, cores=frozenset({3})))
    assert finding == Finding(
        "error", "ranks 0-3 on n1 are bound to 1 core (3) of 16", "start mpirun with --bind-to none"
    )


def test_only_those_that_share_a_core_are_named() -> None:
    reports = changed(cluster(2, 4, launcher="srun"), {5, 6}, cores=frozenset({0}))
    (finding,) = crowded_cores(reports)
    assert finding.what == "ranks 5-6 on n2 are bound to 1 core (0) of 16"
    assert "--cpu-bind=none" in finding.remedy


def test_each_rank_may_be_bound_to_a_core_of_its_own() -> None:
    reports = [dataclasses.replace(each, cores=frozenset({each.local_rank})) for each in cluster(1, 16)]
    assert crowded_cores(reports) == []


def test_cores_that_no_rank_may_use() -> None:
    """As mpirun binds one or two ranks by itself; not said beside the error that ranks share a core."""
    bound = dataclasses.replace(cluster(1, 1)[0], cores=frozenset({3}), binding=binding(1, {3}))
    (finding,) = check_ranks([bound])
    assert finding == Finding("warning", "1 rank on n1 may use 1 of its 16 cores", "start mpirun with --bind-to none")
    shared = cluster(1, 2, cores=frozenset({3}), binding=binding(1, {3}))
    assert [finding.severity for finding in check_ranks(shared)] == ["error"]


def test_openmp_binds_ranks_to_the_same_cores() -> None:
    (finding,) = check_ranks(cluster(1, 2, binding=binding(1, range(16), "OMP_PROC_BIND=true")))
    assert finding == Finding(
        "warning", "OMP_PROC_BIND=true binds threads of all ranks on n1 to the same cores", "unset OMP_PROC_BIND"
    )
    assert check_ranks(cluster(1, 1, binding=binding(1, range(16), "OMP_PROC_BIND=true"))) == []


def test_more_ranks_than_cores() -> None:
    (finding,) = crowded_cores(cluster(1, 3, cores=frozenset({0, 1}), launcher_cores=frozenset({0, 1})))
    assert (finding.severity, finding.what) == ("warning", "n1 has 3 ranks and 2 cores for them")


def test_different_versions() -> None:
    reports = changed(cluster(2, 2), {2, 3}, software={**SOFTWARE, "torch": "2.6.0"})
    (finding,) = different_software(reports)
    assert finding.severity == "error"
    assert finding.what == "ranks differ in torch: 2.13.0 on ranks 0-1 on n1; 2.6.0 on ranks 2-3 on n2"


@pytest.mark.parametrize(("siblings", "severity"), [(4, "error"), (1, "warning")])
def test_every_process_is_rank_0(siblings: int, severity: str) -> None:
    reports = cluster(1, 1, launcher="none", engine="solo", parent="mpiexec.hydra", siblings=siblings)
    (finding,) = alone_under_a_launcher(reports)
    assert finding.severity == severity
    assert finding.what.startswith("mpiexec.hydra started this process on n1, but it runs as a job of one rank")
    assert "the mpirun of Open MPI 5.0.11" in finding.remedy


@pytest.mark.parametrize("parent", ["", "bash", "slurmstepd"])
def test_a_process_started_by_itself_may_be_alone(parent: str) -> None:
    assert alone_under_a_launcher(cluster(1, 1, launcher="none", engine="solo", parent=parent)) == []


@pytest.mark.parametrize(
    ("ranks", "gpus", "severity", "what"),
    [
        ({2, 3}, (), "error", "2 x A100 on ranks 0-1 on n1; none on ranks 2-3 on n2"),
        ({3}, ("A100",), "warning", "2 x A100 on ranks 0-1 on n1 and 2 on n2; 1 x A100 on rank 3 on n2"),
        ({2, 3}, ("V100",) * 2, "warning", "2 x A100 on ranks 0-1 on n1; 2 x V100 on ranks 2-3 on n2"),
    ],
)
def test_different_gpus(ranks: set[int], gpus: tuple[str, ...], severity: str, what: str) -> None:
    (finding,) = different_gpus(changed(cluster(2, 2, gpus=2), ranks, gpus=gpus))
    assert (finding.severity, finding.what) == (severity, f"ranks see different GPUs: {what}")
    assert "CUDA_VISIBLE_DEVICES" in finding.remedy


@pytest.mark.parametrize(
    ("engine", "gpus", "what", "remedy"),
    [
        ("mpi", 2, "engine mpi has no CUDA support", "torch"),
        ("horovod", 2, "Horovod 0.28.1 (Gloo, MPI) is built without NCCL", "hvdlm install-horovod"),
        ("torch", 1, "more ranks than GPUs on n1, n2", "one rank for each GPU"),
    ],
)
def test_gpu_tensors_copied_through_host_memory(engine: str, gpus: int, what: str, remedy: str) -> None:
    (finding,) = unsupported_gpus(cluster(2, 2, gpus=gpus, engine=engine, supports_gpus=False))
    assert finding.severity == "warning"
    assert "the GPUs of ranks 0-1 on n1 and 2-3 on n2" in finding.what and what in finding.what
    assert remedy in finding.remedy


def test_one_visible_gpu_a_rank_is_shared_only_where_it_is_the_same() -> None:
    """As `srun --gpus-per-task=1` arranges it on n1; on n2 both ranks see one GPU."""
    reports = cluster(2, 2, gpus=1, engine="torch", supports_gpus=False)
    (finding,) = unsupported_gpus(changed(reports, {1}, gpu_uuids=("GPU-0-1",)))
    assert finding.what.endswith("more ranks than GPUs on n2 make NCCL unusable")


@pytest.mark.parametrize(
    ("free", "gpus", "ranks", "severity"),
    [
        (63 * 2**20, 0, 2, "warning"),  # Docker's default is 64 MiB
        (64 * 2**20, 0, 2, None),
        (127 * 2**20, 0, 8, "error"),  # Open MPI takes 16 MiB for each rank
        (128 * 2**20, 0, 8, None),
        (GIB - 1, 2, 2, "warning"),  # NCCL needs 1 GiB
        (GIB, 2, 2, None),
    ],
)
def test_shared_memory(free: int, gpus: int, ranks: int, severity: str | None) -> None:
    findings = little_shared_memory(cluster(1, ranks, gpus=gpus, shared_memory=free))
    assert [each.severity for each in findings] == ([severity] if severity else [])
    assert all(each.what.startswith(f"n1 has {free // 2**20} MiB free in /dev/shm") for each in findings)


def test_variables_that_name_interfaces() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "", "HOROVOD_GLOO_IFACE": "eth0", "NCCL_SOCKET_IFNAME": "^docker0"}
    assert interface_variables(environment) == {"HOROVOD_GLOO_IFACE": "eth0"}


def test_a_variable_that_names_no_interface() -> None:
    reports = changed(cluster(2, 1), {1}, variables={"GLOO_SOCKET_IFNAME": "eth9"})
    (finding,) = wrong_interface_variables(reports)
    assert finding.what == "GLOO_SOCKET_IFNAME=eth9 names no interface of n2, which has eth0 (10.0.0.2/24)"
    assert finding.remedy.startswith("unset GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("GLOO_SOCKET_IFNAME", "docker0"), ("OMPI_MCA_btl_tcp_if_include", "172.17.0.0/16")],
)
def test_a_variable_that_names_a_network_that_does_not_join_the_hosts(variable: str, value: str) -> None:
    findings = wrong_interface_variables(cluster(2, 2, ETHERNET, DOCKER, variables={variable: value}))
    assert [each.what for each in findings] == [
        f"{variable}={value} on {host} is on 172.17.0.0/16, which does not join all hosts" for host in ("n1", "n2")
    ]
    assert findings[0].remedy == "name the interface on 10.0.0.0/24: eth0"


@pytest.mark.parametrize(
    ("variable", "value", "is_named"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True),  # NCCL takes the beginning of a name
        ("NCCL_SOCKET_IFNAME", "ib,eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "l", True),  # lo
        ("NCCL_SOCKET_IFNAME", "th0", False),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("OMPI_MCA_btl_tcp_if_include", "eth", False),
    ],
)
def test_which_names_a_variable_takes(variable: str, value: str, is_named: bool) -> None:
    findings = wrong_interface_variables(cluster(2, 1, variables={variable: value}))
    assert bool(findings) != is_named


def test_a_cpu_quota_counts_as_few_cores() -> None:
    assert crowded_cores(cluster(1, 2, usable_cores=2)) == []
    (finding,) = crowded_cores(cluster(1, 2, usable_cores=1))
    assert finding.what == "n1 has 2 ranks and 1 core for them, by its CPU quota"


def test_cpus_that_round_otherwise() -> None:
    reports = changed(cluster(2, 2, cpu_capability="AVX512"), {3}, cpu_capability="AVX2")
    (finding,) = different_instructions(reports)
    assert finding.severity == "warning"
    assert finding.what.endswith(": AVX512 on ranks 0-1 on n1 and 2 on n2; AVX2 on rank 3 on n2")
    assert different_instructions(cluster(2, 2, cpu_capability="AVX512")) == []
    assert different_instructions(changed(cluster(2, 2, gpus=2), {3}, cpu_capability="AVX2")) == []


def test_codecs_that_cannot_be_kept_compiled() -> None:
    assert uncompiled_codecs(cluster(2, 2)) == []
    problem = "Numba can write nowhere"
    (finding,) = uncompiled_codecs(changed(cluster(2, 2), {2, 3}, compiler_problem=problem))
    assert (finding.severity, finding.what) == ("warning", f"{problem}, on ranks 2-3 on n2")
    assert "NUMBA_CACHE_DIR" in finding.remedy
    (finding,) = uncompiled_codecs(cluster(1, 1, compiler_problem="Numba cannot be imported (needs NumPy 2.3)"))
    assert finding.severity == "error"


@pytest.mark.parametrize("value", ["eth0", "docker0,eth0", "10.0.0.0/24", "=eth0"])
def test_a_variable_that_names_a_network_that_joins_the_hosts(value: str) -> None:
    assert wrong_interface_variables(cluster(2, 2, ETHERNET, DOCKER, variables={"NCCL_SOCKET_IFNAME": value})) == []


@pytest.mark.parametrize(
    ("engine", "remedy"),
    [
        ("mpi", "mpirun --mca btl_tcp_if_include 10.1.0.0/24"),
        ("horovod", "horovodrun --network-interfaces ib0, or mpirun --mca btl_tcp_if_include 10.1.0.0/24"),
        ("torch", "set GLOO_SOCKET_IFNAME=ib0"),
    ],
)
def test_a_faster_network_is_not_used(engine: str, remedy: str) -> None:
    (finding,) = slow_networks(cluster(2, 2, ETHERNET, FABRIC, engine=engine))
    assert finding == Finding(
        "warning", "nodes communicate on 10.0.0.0/24 at 1000 Mbit/s, but 10.1.0.0/24 offers 100000", remedy
    )


def test_a_route_on_a_network_that_does_not_join_the_hosts() -> None:
    reports = changed(cluster(2, 1, ETHERNET, DOCKER), {0}, towards_next_node=interface(DOCKER, 1))
    (finding,) = slow_networks(reports)
    assert finding.what.startswith("n1 would reach the next node on 172.17.0.0/16, which does not join all hosts")


def test_no_route_by_name() -> None:
    (finding,) = slow_networks(changed(cluster(2, 1), {1}, towards_next_node=None))
    assert finding.what == "n2 has no route to the next node by its name"
    assert "10.0.0.0/24 in /etc/hosts" in finding.remedy


def test_names_of_ranks() -> None:
    reports = cluster(2, 4)
    assert name_ranks(reports[3:4]) == "rank 3 on n1"
    assert name_ranks(reports[1:3]) == "ranks 1-2 on n1"
    assert name_ranks([reports[0], *reports[2:6]]) == "ranks 0,2-3 on n1 and 4-5 on n2"
    assert number_ranges({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"


def test_what_gradients_take_between_nodes() -> None:
    """40 MB on two nodes, of which a ring sends each byte once from each, and 5.16 MB by int4."""
    sentence = exchange_sentence(12.5e6, 2)
    assert sentence is not None and sentence.startswith("gradients of 10M parameters take 3.2 s between nodes, 0.41 s")
    assert exchange_sentence(12.5e9, 2) is None
    longer = exchange_sentence(12.5e6, 4)
    assert longer is not None and "take 4.8 s" in longer
