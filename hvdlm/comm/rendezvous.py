"""Where the ranks of engine `torch` meet: each launcher has a channel by which rank 0 can tell the others."""

from __future__ import annotations

import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from hvdlm.errors import HvdlmError


def find_rank_0(launcher: str, rank: int, timeout: float) -> tuple[str, int]:
    """Address and port at which rank 0 is to listen; every rank of the job gets the same.

    `launcher`: as of `launch.Launch`. `timeout`: seconds to wait for rank 0's word.
    """
    if launcher == "none":
        return "127.0.0.1", 0
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        return _through_horovodrun(os.environ, rank, timeout)
    if launcher == "srun" and "PMIX_RANK" not in os.environ:
        return through_slurm(os.environ)
    return _through_mpi(timeout)


def through_slurm(environment: Mapping[str, str]) -> tuple[str, int]:
    """Known without a message: the first node of the step, and a port made from the numbers of job and step."""
    # gpu-a[03-10,12],b7: each bracket by its first number, then the first name
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    number = int(environment["SLURM_JOB_ID"]) * 8 + int(environment["SLURM_STEP_ID"]) % 8
    return first, 20000 + number % 12000


def _through_mpi(timeout: float) -> tuple[str, int]:
    from hvdlm.comm.mpi import MPICommunicator

    guide = MPICommunicator(timeout)
    address, port = guide.broadcast_object(_own_place())
    one_node = guide.node_count == 1
    guide.close()
    return ("127.0.0.1" if one_node else address), port


def _through_horovodrun(environment: Mapping[str, str], rank: int, timeout: float) -> tuple[str, int]:
    """By the key-value store that horovodrun serves over HTTP to its ranks: PUT a value, GET it, 404 until then."""
    server = f"{environment['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{environment['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    url = f"http://{server}/hvdlm/rank_0"
    if rank == 0:
        address, port = _own_place()
        if environment["HOROVOD_LOCAL_SIZE"] == environment["HOROVOD_SIZE"]:
            address = "127.0.0.1"
        urllib.request.urlopen(urllib.request.Request(url, f"{address} {port}".encode(), method="PUT"), timeout=timeout)
        return address, port
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                address, port_text = answer.read().decode().split()
                return address, int(port_text)
        except urllib.error.HTTPError:
            time.sleep(0.05)
    raise HvdlmError(f"rank {rank} heard nothing from rank 0 at {server} within {timeout:g} s (comm.timeout)")


def _own_place() -> tuple[str, int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return socket.gethostname(), int(listener.getsockname()[1])
