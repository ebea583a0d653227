"""Rendezvous of engine `torch`: a TCP store that rank 0 serves, found on hosts with any number of networks.

Under Slurm and with MASTER_ADDR all ranks know the endpoint beforehand. Under mpirun rank 0 broadcasts it over MPI,
under horovodrun by its key-value store: all its addresses, of which each rank takes the first that answers with this
job's token, since an address may be unreachable, or belong to another host too (docker0).
"""

from __future__ import annotations

import http
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # it fills itself in at run time

from hvdlm.comm.failure import RunningTime
from hvdlm.comm.interfaces import interface_towards, own_interfaces
from hvdlm.comm.liveness import LivenessServer, is_alive
from hvdlm.comm.startup import STARTUP_TIMEOUT, start_mpi
from hvdlm.errors import HvdlmError

LOOPBACK = "127.0.0.1"

# Seconds for one address to answer: TCP sends a lost packet again after one second.
_PROBE_TIMEOUT = 2.5


@dataclass(frozen=True)
class _Endpoint:
    """Where rank 0 serves the store, and a liveness server that answers with the job's token."""

    addresses: list[str]  # of rank 0, the best first
    store_port: int
    liveness_port: int
    token: str


def rendezvous(launcher: str, rank: int, size: int, timeout: float) -> Store:
    """The store of all ranks of this job; also makes Gloo use the network on which they connected,
    unless GLOO_SOCKET_IFNAME is set.

    `launcher`: as of `launch.Launch`; `timeout`: seconds of each wait, here and in the store. Raises HvdlmError on a
    rank that does not find rank 0.
    """
    limit = timedelta(seconds=timeout)
    known = _known_endpoint(launcher, os.environ)
    if known:
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it listens itself
        store: Store = TCPStore(*known, size, is_master=rank == 0 and not by_torchrun, timeout=limit)
        if by_torchrun:
            store = _store_of_this_start(store, rank, os.environ)
        _use_network(store, rank, size, _resolve(known[0]))
    elif rank == 0:
        store = TCPStore(LOOPBACK, 0, size, is_master=True, wait_for_workers=False, timeout=limit)
        token = uuid.uuid4().hex
        with closing(LivenessServer(token, poll_interval=0.05)) as server:
            endpoint = _Endpoint(_own_addresses(), store.port, server.port, token)
            _broadcast_text(json.dumps(asdict(endpoint)), rank, timeout)
            _use_network(store, rank, size, LOOPBACK)  # returns when all ranks have connected
    else:
        endpoint, address = _find_rank_0(rank, timeout)
        store = TCPStore(address, endpoint.store_port, size, wait_for_workers=False, timeout=limit)
        _use_network(store, rank, size, address)
    return store


def _known_endpoint(launcher: str, environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Host and port at which rank 0 listens, where all ranks know them without a message."""
    if launcher == "none":
        return LOOPBACK, 0
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
        if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) >= 2**16:
            raise HvdlmError(
                f"MASTER_ADDR={host} and MASTER_PORT={port} are no host and port of rank 0: unset both, or leave them "
                "to the launcher"
            )
        return host, int(port)
    if launcher == "srun" and "PMIX_RANK" not in environment:
        return slurm_endpoint(environment)
    return None


def slurm_endpoint(environment: Mapping[str, str]) -> tuple[str, int]:
    """The first node of the step, and a port derived from the numbers of job and step: no message is needed."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    if not all(environment.get(name) for name in names) or not all(environment[name].isdigit() for name in names[1:]):
        said = ", ".join(f"{name}={environment.get(name, '')}" for name in names)
        raise HvdlmError(f"Slurm's variables do not say where rank 0 is ({said}): start the ranks with srun")
    # gpu-a[03-10,12],b7: each bracket by its first number, then the first name
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    number = int(environment["SLURM_JOB_ID"]) * 8 + int(environment["SLURM_STEP_ID"]) % 8
    return first, 20000 + number % 12000


def _store_of_this_start(store: Store, rank: int, environment: Mapping[str, str]) -> Store:
    """The part of torchrun's store that belongs to this start: what an earlier one has left there would be read again.

    torchrun keeps its store when it starts all ranks again, and so does a script of several commands under it, which
    every rank runs in one order.
    """
    attempt = PrefixStore(f"hvdlm/attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return PrefixStore(f"start_{attempt.add(f'starts_of_{rank}', 1)}", attempt)


def _find_rank_0(rank: int, timeout: float) -> tuple[_Endpoint, str]:
    """Where rank 0 serves the store, and the address of it that answers this rank.

    horovodrun's store may still have the endpoint of a command that has ended: then it is read again until rank 0 has
    written its own.
    """
    clock = RunningTime()
    while True:
        endpoint = _Endpoint(**json.loads(_broadcast_text("", rank, timeout)))
        try:
            return endpoint, _reachable_address(endpoint, rank)
        except HvdlmError:
            if "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ or clock.seconds() > min(timeout, STARTUP_TIMEOUT):
                raise
            time.sleep(0.5)


def _broadcast_text(text: str, rank: int, timeout: float) -> str:
    """Broadcasts `text` of rank 0, over horovodrun's key-value store or over MPI."""
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        return _broadcast_by_horovodrun(os.environ, text, rank, timeout)
    return _broadcast_by_mpi(text, rank, timeout)


def _broadcast_by_mpi(text: str, rank: int, timeout: float) -> str:
    communicator = start_mpi(rank, timeout)
    text = communicator.broadcast_object(text)
    communicator.close()
    return text


def _broadcast_by_horovodrun(environment: Mapping[str, str], text: str, rank: int, timeout: float) -> str:
    """By the key-value store that horovodrun serves over HTTP to its ranks: PUT a value, GET it, 404 until then."""
    server = f"{environment['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{environment['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    url = f"http://{server}/hvdlm/rank_0"
    # No proxy, whatever http_proxy says: the store is on a host of this job
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        if rank == 0:
            ask(urllib.request.Request(url, text.encode(), method="PUT"), timeout=timeout)
            return text
        clock = RunningTime()
        while clock.seconds() < timeout:
            try:
                with ask(url, timeout=timeout) as answer:
                    return str(answer.read().decode())
            except urllib.error.HTTPError as error:
                if error.code != http.HTTPStatus.NOT_FOUND:
                    raise
                time.sleep(0.05)
    except urllib.error.HTTPError as error:
        raise HvdlmError(
            f"rank {rank} asked {server} for horovodrun's key-value store, which answers {error.code} {error.reason}: "
            "something else listens there"
        ) from None
    except OSError as error:  # urllib's are such errors
        reason = getattr(error, "reason", error)
        raise HvdlmError(
            f"rank {rank} on {socket.gethostname()} does not reach horovodrun's key-value store at {server} "
            f"({reason}): look for a firewall between the hosts, or give --network-interfaces to horovodrun"
        ) from None
    raise HvdlmError(f"rank {rank} received nothing from rank 0 at {server} within {timeout:g} s (comm.timeout)")


def _own_addresses() -> list[str]:
    """Loopback for ranks of this host, then networks by speed, then the name for those that have no IPv4."""
    interfaces = sorted(own_interfaces(), key=lambda interface: -(interface.megabits or 0))
    return [LOOPBACK, *(str(interface.address.ip) for interface in interfaces), socket.gethostname()]


def _reachable_address(endpoint: _Endpoint, rank: int) -> str:
    """The first of rank 0's addresses at which this job's rank 0 answers."""
    for address in endpoint.addresses:
        if is_alive(address, endpoint.liveness_port, endpoint.token, _PROBE_TIMEOUT):
            return address
    own = ", ".join(f"{each.address} ({each.name})" for each in own_interfaces()) or "no network"
    raise HvdlmError(
        f"rank {rank} on {socket.gethostname()}, which has {own}, reaches rank 0 at none of its addresses "
        f"{', '.join(endpoint.addresses[1:])}: let one network join all hosts, with its TCP ports open between them"
    )


def _use_network(store: Store, rank: int, size: int, reached: str) -> None:
    """Sets Gloo's interface on this host to the one towards the address at which other hosts reached rank 0."""
    store.set(f"hvdlm/reached/{rank}", reached)
    everyone = [store.get(f"hvdlm/reached/{each}").decode() for each in range(size)]
    remote = [address for address in everyone if not address.startswith("127.")]
    towards = interface_towards(remote[0]) if remote else None
    name = towards.name if towards else "lo" if not remote else None
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:  # it has no IPv4 address
        return host
