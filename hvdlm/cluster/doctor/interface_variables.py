"""Environment variables that name network interfaces: what each means, and whether this host has what they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.comm.interfaces import Interface

# Gloo of PyTorch and of Horovod, NCCL, Open MPI. What excludes interfaces (NCCL's ^ and Open MPI's if_exclude) names
# none.
VARIABLES = ("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")

_LOOPBACK = "lo"


def interface_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `VARIABLES` that are set and name interfaces."""
    return {name: environment[name] for name in VARIABLES if environment.get(name, "^")[0] != "^"}


def named_interfaces(value: str, interfaces: Sequence[Interface]) -> list[Interface]:
    """Which of `interfaces` a variable's value names: by name, for NCCL by its beginning, for Open MPI by network."""
    return [each for entry in value.lstrip("=").split(",") if entry for each in interfaces if _is_named(entry, each)]


def misnamed_interfaces(host: str, variables: Mapping[str, str], interfaces: Sequence[Interface]) -> list[Finding]:
    """Variables that name nothing that `host` has."""
    has = ", ".join(f"{each.name} ({each.address})" for each in interfaces) or "only its loopback"
    return [
        Finding(
            "error",
            f"{variable}={value} names no interface of {host}, which has {has}",
            f"unset {variable}, or name the interface that joins the hosts",
        )
        for variable, value in variables.items()
        if not named_interfaces(value, interfaces) and _LOOPBACK not in value.lstrip("=").split(",")
    ]


def _is_named(entry: str, interface: Interface) -> bool:
    if "/" in entry:
        try:
            return interface.address.ip in IPv4Network(entry, strict=False)
        except ValueError:
            return False
    return interface.name == entry
