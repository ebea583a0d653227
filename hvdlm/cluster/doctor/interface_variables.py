"""Environment variables that select network interfaces, and whether a host has the interfaces they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.comm.interfaces import Interface

# Of Gloo in PyTorch, Gloo in Horovod, NCCL and Open MPI. Values that exclude interfaces (NCCL's ^eth0) are not checked.
VARIABLES = ("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")

_LOOPBACK = "lo"


def interface_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `VARIABLES` that are set, not empty, and do not start with ^, which excludes interfaces."""
    values = {name: environment.get(name, "") for name in VARIABLES}
    return {name: value for name, value in values.items() if value and not value.startswith("^")}


def named_interfaces(variable: str, value: str, interfaces: Sequence[Interface]) -> list[Interface]:
    """Those of `interfaces` that the value of `variable` names, by interface name or by network (10.0.0.0/24).

    NCCL takes the beginning of a name, so eth names eth0 and eth1, unless the value begins with = (its environment
    variables, NCCL_SOCKET_IFNAME).
    """
    return [each for entry in _entries(value) for each in interfaces if _is_named(variable, value, entry, each)]


def misnamed_interfaces(host: str, variables: Mapping[str, str], interfaces: Sequence[Interface]) -> list[Finding]:
    """Finds variables that name no interface of `host`."""
    has = ", ".join(f"{each.name} ({each.address})" for each in interfaces) or "only its loopback"
    return [
        Finding(
            "error",
            f"{variable}={value} names no interface of {host}, which has {has}",
            f"unset {variable}, or name the interface that joins the hosts",
        )
        for variable, value in variables.items()
        if not named_interfaces(variable, value, interfaces)
        and not any(_has_name(variable, value, entry, _LOOPBACK) for entry in _entries(value))
    ]


def _entries(value: str) -> list[str]:
    return [entry for entry in value.lstrip("=").split(",") if entry]


def _is_named(variable: str, value: str, entry: str, interface: Interface) -> bool:
    if "/" in entry:
        try:
            return interface.address.ip in IPv4Network(entry, strict=False)
        except ValueError:
            return False
    return _has_name(variable, value, entry, interface.name)


def _has_name(variable: str, value: str, entry: str, name: str) -> bool:
    """Whether an entry of a variable's value means the interface called `name`."""
    takes_prefixes = variable.startswith("NCCL_") and not value.startswith("=")
    return name.startswith(entry) if takes_prefixes else name == entry
