"""Which networks join hosts, by hand-made interfaces; and what this machine says of its own."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import IPv4Interface, IPv4Network
from types import SimpleNamespace

import psutil
import pytest

from hvdlm.comm.interfaces import Interface, address_beside, interface_towards, joining_networks, own_interfaces


def host(**interfaces: tuple[str, int | None]) -> list[Interface]:
    """Interfaces by name: address and speed."""
    return [Interface(name, IPv4Interface(address), speed) for name, (address, speed) in interfaces.items()]


def test_the_network_that_all_have() -> None:
    hosts = [
        host(eth0=("10.0.0.1/24", 1000), eth1=("192.168.1.1/24", 1000)),
        host(ens3=("10.0.0.2/24", 1000), wlan0=("192.168.2.2/24", 1000)),
        host(eth0=("10.0.0.3/24", 1000)),
    ]
    assert joining_networks(hosts) == [IPv4Network("10.0.0.0/24")]


def test_what_looks_alike_on_all_hosts_joins_none() -> None:
    hosts = [
        host(docker0=("172.17.0.1/16", 10000), eth0=("10.0.0.1/24", 1000)),
        host(docker0=("172.17.0.1/16", 10000), eth0=("10.0.0.2/24", 1000)),
    ]
    assert joining_networks(hosts) == [IPv4Network("10.0.0.0/24")]


def test_no_common_network() -> None:
    assert joining_networks([host(eth0=("10.0.0.1/24", 1000)), host(eth0=("10.0.1.1/24", 1000))]) == []
    assert joining_networks([host(eth0=("10.0.0.1/24", 1000)), []]) == []
    # an address within the other's network, but with a netmask of its own
    assert joining_networks([host(eth0=("10.0.0.1/24", 1000)), host(eth0=("10.0.0.2/16", 1000))]) == []


def test_the_fastest_slowest_link_comes_first() -> None:
    hosts = [
        host(a=("10.1.0.1/24", 100_000), b=("10.2.0.1/24", 10_000), c=("10.3.0.1/24", None), d=("10.0.0.1/24", 1000)),
        host(a=("10.1.0.2/24", 1000), b=("10.2.0.2/24", 10_000), c=("10.3.0.2/24", 400_000), d=("10.0.0.2/24", 1000)),
    ]
    expected = ["10.2.0.0/24", "10.0.0.0/24", "10.1.0.0/24", "10.3.0.0/24"]  # equals by address, the unknown last
    assert [str(network) for network in joining_networks(hosts)] == expected
    assert [str(network) for network in joining_networks(hosts[::-1])] == expected


def test_two_addresses_of_one_host_on_one_network() -> None:
    hosts = [host(a=("10.0.0.1/24", 1000), b=("10.0.0.2/24", 25_000)), host(a=("10.0.0.3/24", 25_000))]
    slower = [[*own, *host(e=(f"10.9.0.{number}/24", 10_000))] for number, own in enumerate(hosts, start=1)]
    assert joining_networks(slower) == [IPv4Network("10.0.0.0/24"), IPv4Network("10.9.0.0/24")]


def test_own_addresses_are_this_machine_s() -> None:
    for interface in own_interfaces():
        assert not interface.address.is_loopback
        with socket.socket() as own:
            own.bind((str(interface.address.ip), 0))  # the kernel refuses any that is not its own


def test_interfaces_that_are_down_or_of_unknown_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(is_up: bool, speed: int) -> object:
        return SimpleNamespace(isup=is_up, speed=speed)

    def entry(family: int, address: str, netmask: str | None) -> object:
        return SimpleNamespace(family=family, address=address, netmask=netmask)

    states = {"eth1": state(True, 0), "eth0": state(True, 25_000), "down": state(False, 100), "lo": state(True, 0)}
    addresses: Mapping[str, list[object]] = {
        "eth1": [entry(socket.AF_INET, "10.0.0.1", "255.255.0.0")],
        "eth0": [entry(socket.AF_INET6, "fe80::1", None), entry(socket.AF_INET, "10.9.0.1", "255.255.255.0")],
        "down": [entry(socket.AF_INET, "10.8.0.1", "255.255.255.0")],
        "lo": [entry(socket.AF_INET, "127.0.0.1", "255.0.0.0"), entry(socket.AF_INET, "10.7.0.1", None)],
        "gone": [entry(socket.AF_INET, "10.6.0.1", None)],  # removed between two questions to the kernel
    }
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    assert own_interfaces() == [
        Interface("eth0", IPv4Interface("10.9.0.1/24"), 25_000),
        Interface("eth1", IPv4Interface("10.0.0.1/16"), None),
    ]


def test_the_interface_towards_a_host() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no-such-host.invalid") is None
    assert interface_towards("not..a.name") is None
    for interface in own_interfaces():
        assert interface_towards(str(interface.address.ip)) == interface


@pytest.mark.parametrize(
    ("first_host", "own"),
    [
        ("", ""),
        ("0.0.0.0", "0.0.0.0"),
        ("10.0.1.7", "10.0.0.1"),  # of eth1, whose network is 10.0.0.0/16
        ("10.9.0.200", "10.9.0.1"),
        ("10.9.1.200", None),
        ("127.0.0.1", None),
        ("::1", None),
        ("no-such-host.invalid", None),
    ],
)
def test_the_address_beside_that_of_another_host(
    first_host: str, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interfaces = host(eth0=("10.9.0.1/24", None), eth1=("10.0.0.1/16", None))
    monkeypatch.setattr("hvdlm.comm.interfaces.own_interfaces", lambda: interfaces)
    assert address_beside(first_host) == own
