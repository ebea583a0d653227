"""Process 1 of a host of a fabric: sets the host's name and mounts, starts its daemons, and reaps ended processes.

`Fabric.up` starts it as `python -m hvdlm.cluster.fabric.host STATE NAME` in new network, UTS, mount and PID
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

from hvdlm.cluster.fabric.config_files import TMPDIR
from hvdlm.cluster.fabric.network import INTERFACE
from hvdlm.cluster.fabric.programs import path_of, run


def run_host(state: Path, name: str) -> None:
    """Sets the host up, prints "ready", and reaps ended processes until it is killed."""
    socket.sethostname(name)
    _mount(state, name)
    while not _has_link():  # Fabric.up connects it from outside
        time.sleep(0.01)
    for command in _daemons(state, name):
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print("ready", flush=True)
    while True:
        os.wait()


def _mount(state: Path, name: str) -> None:
    """Mounts a /run, /dev/shm and /sys of the host's own, and its configuration files over those in /etc."""
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    for directory in ("sshd", "munge", "lock", "cgroup"):
        Path("/run", directory).mkdir(mode=0o755)
    Path(TMPDIR).mkdir()
    Path(TMPDIR).chmod(0o1777)
    # A new /sys shows the network interfaces of this namespace. slurmd needs the control groups in it.
    run("mount", "--rbind", "/sys/fs/cgroup", "/run/cgroup")
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    run("mount", "--rbind", "/run/cgroup", "/sys/fs/cgroup")
    binds = [(state / name / "ssh", Path("/etc/ssh")), (state / "hosts", Path("/etc/hosts"))]
    binds += [(state / "shadow", Path("/etc/shadow"))]
    user_ssh = Path(pwd.getpwuid(os.geteuid()).pw_dir, ".ssh")
    if user_ssh.exists():  # hides the user's keys and configuration
        binds.append((state / name / "home-ssh", user_ssh))
    if (state / "slurm").exists():
        binds.append((state / "slurm", Path("/etc/slurm")))
    for source, target in binds:
        run("mount", "--bind", str(source), str(target))


def _has_link() -> bool:
    return INTERFACE in (name for _, name in socket.if_nameindex())


def _daemons(state: Path, name: str) -> list[list[str]]:
    """The commands of the daemons that run on host `name`."""
    daemons = [[path_of("sshd"), "-D", "-e"]]
    if (state / "slurm").exists():
        files = {"key": state / "munge.key", "log": state / name / "munged.log", "seed": state / name / "munged.seed"}
        options = [f"--{kind}-file={path}" for kind, path in files.items()]
        daemons.append([path_of("munged"), "--foreground", "--force", *options, "--pid-file=/run/munge/munged.pid"])
        if name == "h1":
            daemons.append([path_of("slurmctld"), "-D"])
        daemons.append([path_of("slurmd"), "-D", "-N", name])
    return daemons


if __name__ == "__main__":
    run_host(Path(sys.argv[1]), sys.argv[2])
