"""Writes the files that a fabric's hosts need before they start: host names, ssh keys and daemon configurations.

All of them are in the fabric's state directory. Each host mounts its own files over those in /etc (host.py).
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from hvdlm.cluster.fabric.network import NETWORK, address
from hvdlm.cluster.fabric.programs import path_of, run

# The TMPDIR of each host, in the host's own /run. mpirun names files there by its process number, and does not start if
# a killed mpirun with the same number has left such files (openpmix, ptl_base_listener.c). In a host's PID namespace,
# numbers are reused soon, so these files must not outlive the host.
TMPDIR = "/run/tmp"


def host_names(count: int) -> list[str]:
    """h1, h2, ..."""
    return [f"h{index}" for index in range(1, count + 1)]


def write_config_files(state: Path, hosts: Sequence[str], slots: int, slurm: bool) -> None:
    """Fills a new state directory."""
    (state / "hostfile").write_text("".join(f"{host} slots={slots}\n" for host in hosts))
    _make_key(state / "id_ed25519", "fabric")
    for host in hosts:
        ssh = state / host / "ssh"
        ssh.mkdir(parents=True)
        (state / host / "home-ssh").mkdir(mode=0o700)
        _make_key(ssh / "ssh_host_ed25519_key", host)
        (ssh / "authorized_keys").write_text((state / "id_ed25519.pub").read_text())
        (ssh / "sshd_config").write_text(_SSHD_CONFIG.format(temporary=TMPDIR))
        (ssh / "ssh_config").write_text(_SSH_CONFIG.format(state=state, host=host))
    addresses = {host: address(host) for host in hosts}
    known = "".join(
        f"{host},{addresses[host]} {(state / host / 'ssh' / 'ssh_host_ed25519_key.pub').read_text()}" for host in hosts
    )
    for host in hosts:
        (state / host / "ssh" / "ssh_known_hosts").write_text(known)
    (state / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in addresses.items())
    )
    _write_shadow(state / "shadow")
    if slurm:
        _write_slurm(state, hosts, slots)


def _make_key(path: Path, comment: str) -> None:
    run(path_of("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))


_SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
PidFile none
# A launcher opens many sessions at once
MaxStartups 200
MaxSessions 200
SetEnv TMPDIR={temporary}
"""

_SSH_CONFIG = """\
Host *
    IdentityFile {state}/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile {state}/{host}/known_hosts
"""


def _write_shadow(path: Path) -> None:
    """Writes a copy of /etc/shadow in which this user's account is not locked; sshd refuses locked accounts."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    lines = Path("/etc/shadow").read_text().splitlines()
    fields = [line.split(":") for line in lines]
    path.touch(mode=0o600)
    path.write_text(
        "".join(
            ":".join([name, "*" if name == user and password.startswith("!") else password, *rest]) + "\n"
            for name, password, *rest in fields
        )
    )


def _write_slurm(state: Path, hosts: Sequence[str], slots: int) -> None:
    """Writes slurm.conf and the key of munge, and makes the directories of the daemons."""
    directory = state / "slurm"
    directory.mkdir()
    (state / "slurmctld").mkdir()
    for host in hosts:
        for name in ("slurmd", "tmp"):
            (state / host / name).mkdir()
    key = state / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(1024))
    numbers = f"[1-{len(hosts)}]"
    (directory / "slurm.conf").write_text(
        _SLURM_CONF.format(
            state=state,
            controller=hosts[0],
            nodes=f"h{numbers}",
            addresses=f"{str(NETWORK.network_address).rpartition('.')[0]}.{numbers}",
            slots=slots,
        )
    )


_SLURM_CONF = """\
ClusterName=fabric
SlurmctldHost={controller}
SlurmUser=root
StateSaveLocation={state}/slurmctld
SlurmdSpoolDir={state}/%n/slurmd
# PMIx makes a directory for each job here; in the /tmp that all hosts share, it would find another host's
TmpFS={state}/%n/tmp
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n/slurmd.log
AuthType=auth/munge
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0
ReturnToService=2
# A node has as many CPUs as the fabric's hosts have slots, however many cores this machine has.
SlurmdParameters=config_overrides
NodeName={nodes} NodeAddr={addresses} CPUs={slots} State=UNKNOWN
PartitionName=fabric Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
