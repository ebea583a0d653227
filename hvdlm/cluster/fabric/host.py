"""Process 1 of a host of a fabric: gives it a name and a face of its own, starts its daemons, and buries the dead.

Started by `Fabric.up` as `python -m hvdlm.cluster.fabric.host STATE NAME` in new network, UTS, mount and PID
namespaces. When it is killed, the kernel kills every process of the host and removes its mounts and its link.
"""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path

from hvdlm.cluster.fabric.files import TEMPORARY
from hvdlm.cluster.fabric.network import INTERFACE
from hvdlm.cluster.fabric.programs import path_of, run


def live(state: Path, name: str) -> None:
    """Sets the host up, says "ready" on standard output, and goes on until it is killed."""
    socket.sethostname(name)
    _mount(state, name)
    while not _has_link():  # Fabric.up plugs it in from outside
        time.sleep(0.01)
    for command in _daemons(state, name):
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print("ready", flush=True)
    while True:
        os.wait()


def _mount(state: Path, name: str) -> None:
    """Its own /run, /dev/shm and /sys, and its part of the state directory where programs look for it in /etc."""
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    for directory in ("sshd", "munge", "lock", "cgroup"):
        Path("/run", directory).mkdir(mode=0o755)
    Path(TEMPORARY).mkdir()
    Path(TEMPORARY).chmod(0o1777)
    # /sys anew, for the network interfaces of this namespace; slurmd looks for control groups in it
    run("mount", "--rbind", "/sys/fs/cgroup", "/run/cgroup")
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    run("mount", "--rbind", "/run/cgroup", "/sys/fs/cgroup")
    faces = [(state / name / "ssh", Path("/etc/ssh")), (state / "hosts", Path("/etc/hosts"))]
    faces += [(state / "shadow", Path("/etc/shadow"))]
    own = Path(pwd.getpwuid(os.geteuid()).pw_dir, ".ssh")
    if own.exists():  # the user's own keys and configuration have no say here
        faces.append((state / name / "home-ssh", own))
    if (state / "slurm").exists():
        faces.append((state / "slurm", Path("/etc/slurm")))
    for source, target in faces:
        run("mount", "--bind", str(source), str(target))


def _has_link() -> bool:
    return INTERFACE in (name for _, name in socket.if_nameindex())


def _daemons(state: Path, name: str) -> list[list[str]]:
    daemons = [[path_of("sshd"), "-D", "-e"]]
    if (state / "slurm").exists():
        files = {"key": state / "munge.key", "log": state / name / "munged.log", "seed": state / name / "munged.seed"}
        named = [f"--{kind}-file={path}" for kind, path in files.items()]
        daemons.append([path_of("munged"), "--foreground", "--force", *named, "--pid-file=/run/munge/munged.pid"])
        if name == "h1":
            daemons.append([path_of("slurmctld"), "-D"])
        daemons.append([path_of("slurmd"), "-D", "-N", name])
    return daemons


if __name__ == "__main__":
    live(Path(sys.argv[1]), sys.argv[2])
