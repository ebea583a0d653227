"""Starts torchft's lighthouse and replica groups as its README does, and waits until all of these have ended.

torchft_launcher.py SETTINGS RUN_DIR RANKS [FABRIC HOST...]: with emulated hosts, one replica group on each, the
lighthouse on the first. The exit status is 0 if a replica group has trained to the end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

from common.processes import find_program, on_host

_LIGHTHOUSE_OPTIONS = ("--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000")


def main(settings: str, run_dir: str, ranks: str, fabric: str = "", *hosts: str) -> int:
    """Returns the exit status."""
    names = hosts or ("localhost",) * int(ranks)
    before = [on_host(Path(fabric), host) if fabric else [] for host in names]
    lighthouse_port, *ports = _free_ports(1 + len(names))
    torchrun = find_program("torchrun", "it comes with PyTorch")
    script = str(Path(__file__).with_name("torchft_replica.py"))
    lighthouse_program = find_program("torchft_lighthouse", "it comes with torchft")
    bind = ["--bind", f"[::]:{lighthouse_port}"]
    lighthouse = subprocess.Popen([*before[0], lighthouse_program, *_LIGHTHOUSE_OPTIONS, *bind])
    replicas = []
    for replica, (host, port) in enumerate(zip(names, ports, strict=True)):
        options = [f"--master_addr={host}", f"--master_port={port}", "--nnodes=1", "--nproc_per_node=1", "--"]
        replicas.append(
            subprocess.Popen(
                [*before[replica], torchrun, *options, script, settings, run_dir],
                env={
                    **os.environ,
                    "TORCHFT_LIGHTHOUSE": f"http://{names[0]}:{lighthouse_port}",
                    "REPLICA_GROUP_ID": str(replica),
                    "NUM_REPLICA_GROUPS": str(len(names)),
                },
            )
        )
    try:
        return min(abs(replica.wait()) for replica in replicas)
    finally:
        for process in (*replicas, lighthouse):
            process.terminate()
        for process in (*replicas, lighthouse):
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(*sys.argv[1:]))
