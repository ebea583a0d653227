"""Pods for tests, on the hosts of an emulated cluster: the file system of an image, and what operators put there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from cluster import Cluster
from jobs import SETTINGS, assert_same_curve, losses
from launcher import BIN, Result, run, start
from waiting import wait_for

from hvdlm.cluster.fabric.network import address

CHECKOUT = Path(__file__).parents[2]
CONTAINERFILE = CHECKOUT / "examples/kubernetes/Containerfile"
HOME = "/home/hvdlm"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as an image of Debian has it

# Names of a launcher and two workers, as each operator makes them for a job called "rehearsal"
NAMES = {
    "mpijob": ["rehearsal-launcher", "rehearsal-worker-0", "rehearsal-worker-1"],
    "trainjob": ["rehearsal-launcher-0-0", "rehearsal-node-0-0", "rehearsal-node-0-1"],
}
DOMAINS = {"mpijob": ".rehearsal.default.svc", "trainjob": ".rehearsal"}

# What both put into the launcher's environment
VARIABLES = [
    "OMPI_MCA_orte_default_hostfile=/etc/mpi/hostfile",
    "OMPI_MCA_orte_keep_fqdn_hostnames=true",
    "OMPI_MCA_orte_set_default_slots=2",
    "OMPI_MCA_plm_rsh_args=-o ConnectionAttempts=10",
]

# What pods see of this machine where its root file system has another one mounted
_PLACES = dict.fromkeys([str(CHECKOUT), sys.prefix, sys.base_prefix])

_IN_A_ROOT = """
set -euo pipefail
mkdir -p {here}/upper {here}/work {here}/root
mount -t overlay overlay -o lowerdir={lower},upperdir={here}/upper,workdir={here}/work {here}/root
cd {here}/root
mount --rbind /dev dev
mount --rbind /proc proc
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=1777 tmpfs tmp
chmod 755 root
for place in {places}; do mkdir -p ".$place"; mount --rbind "$place" ".$place"; done
"""


def steps() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, each with what follows it."""
    text = re.sub(r"^\\s*#.*\\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


class Image:
    """A file system over this machine's own, made by steps of the Containerfile, a layer each."""

    def __init__(self, disk: Path, leave_out: Sequence[str] = ()) -> None:
        """`disk`: a directory on a file system of its own. `leave_out`: steps whose text has one of these words."""
        self.disk = disk
        self._layers: list[Path] = []  # the last one first
        for instruction, text in steps():
            if not any(word in text for word in leave_out):
                if instruction == "COPY":
                    self._copy(*(word for word in shlex.split(text) if not word.startswith("--")))
                elif instruction == "RUN":
                    self.run(text)

    def _new_layer(self) -> Path:
        layer = self.disk / f"layer{len(self._layers)}"
        self._layers.insert(0, layer / "upper")
        (layer / "upper").mkdir(parents=True)
        return layer

    def _copy(self, *words: str) -> None:
        *sources, target = words
        there = self._new_layer() / "upper" / target.lstrip("/")
        if target.endswith("/"):
            there.mkdir(parents=True)
        there.parent.mkdir(parents=True, exist_ok=True)
        for source in sources:
            whole = CHECKOUT / source
            if whole.is_dir():
                shutil.copytree(whole, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(whole, there)

    def run(self, text: str) -> None:
        """What a shell's command changes is a layer, too."""
        lower = self._lower()
        script = _in_a_root(self._new_layer(), lower) + f"exec chroot . /bin/sh -c {shlex.quote(text)}"
        words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
        subprocess.run(words, env={**os.environ, "PATH": _PATH}, check=True, cwd="/")

    def _lower(self) -> str:
        return ":".join([*map(str, self._layers), "/"])

    def pod(
        self, cluster: Cluster, host: str, name: str, files: Path, volume: Path, command: Sequence[str]
    ) -> list[str]:
        """The command that runs another in a pod on a host, as user 1000, until that ends.

        `files`: what the operator mounts, by its place. `volume`: what all pods see as /shared.
        """
        here = self.disk / "pods" / name
        script = _in_a_root(here, self._lower()) + (
            f"cp -r {files}/. .\nmkdir -p shared\nmount --bind {volume} shared\nhostname {name}\n"
            f"exec chroot --userspec=1000:1000 --groups=1000 . /usr/bin/env -i HOME={HOME} PATH=/usr/bin:/bin "
            f"LANG=C.UTF-8 {shlex.join(command)}"
        )
        return cluster.inside(host, ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", script])


def _in_a_root(here: Path, lower: str) -> str:
    places = " ".join(map(shlex.quote, _PLACES))
    return _IN_A_ROOT.format(here=here, lower=lower, places=places)


class PodJob:
    """The pods of a job, of which workers are up."""

    def __init__(self, kind: str, image: Image, bin: Path, hosts: Cluster, volume: Path, stack: ExitStack) -> None:
        """`bin`: where the image has mpirun and hvdlm. `volume`: /shared of the pods, with data."""
        self._kind, self._image, self._hosts, self._volume, self._stack = kind, image, hosts, volume, stack
        self._bin = bin
        self.run_dir = volume / kind
        self.files = image.disk / kind
        self.command: list[str] = []

    def write(self) -> None:
        """The objects, and what an operator makes of them."""
        settings = {
            **SETTINGS,
            "train.steps": 20,
            "data.path": "/shared/data",
            "train.run_dir": f"/shared/{self._kind}",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        (self._volume / "empty.toml").touch()
        options = ["--image", "hvdlm", "--nodes", "2", "--ranks-per-node", "2", "--volume", "shared:/shared"]
        options += ["--kind", self._kind, "--name", "rehearsal", "--bin", str(self._bin)]
        result = subprocess.run(
            [BIN / "hvdlm", "kubernetes", self._volume / "empty.toml", *options, *words], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        found = {each["kind"]: each for each in yaml.safe_load_all(result.stdout)}
        launcher, worker = self._pods(found)
        self.command = launcher["containers"][0]["command"]
        self._sshd = worker["containers"][0]["command"]
        names, domain = NAMES[self._kind], DOMAINS[self._kind]
        addresses = [address(host) for host in self._hosts.hosts]
        self._put(
            "etc/hosts",
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}{domain} {name}\n" for address, name in zip(addresses, names, strict=True)),
        )
        self._put("etc/mpi/hostfile", "".join(f"{name}{domain} slots=2\n" for name in names[1:]))
        self._put("etc/hvdlm/config.toml", found["ConfigMap"]["data"]["config.toml"])
        keys = self.files / HOME.lstrip("/") / ".ssh"
        keys.mkdir(parents=True)
        words = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", str(keys / "id_rsa")]
        subprocess.run(words, check=True)
        shutil.copy(keys / "id_rsa.pub", keys / "authorized_keys")
        (keys / "id_rsa").chmod(0o644)  # of root: ssh does not mind who may read it

    def _pods(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        if self._kind == "mpijob":
            replicas = found["MPIJob"]["spec"]["mpiReplicaSpecs"]
            return [replicas[name]["template"]["spec"] for name in ("Launcher", "Worker")]
        by_name = {
            each["name"]: each for each in found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
        }
        return [by_name[name]["template"]["spec"]["template"]["spec"] for name in ("launcher", "node")]

    def _put(self, place: str, text: str) -> None:
        (self.files / place).parent.mkdir(parents=True, exist_ok=True)
        (self.files / place).write_text(text)

    def _inside(self, host: str, name: str, command: list[str]) -> list[str]:
        return self._image.pod(self._hosts, host, name, self.files, self._volume, command)

    def start_workers(self) -> None:
        for host, name in zip(self._hosts.hosts[1:], NAMES[self._kind][1:], strict=True):
            self._stack.enter_context(start(self._inside(host, name, self._sshd)))
        for host in self._hosts.hosts[1:]:
            probe = self._hosts.inside(host, ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/2222"])
            wait_for(lambda probe=probe: subprocess.run(probe, capture_output=True).returncode == 0, 30, "sshd")  # type: ignore[misc]

    def launch(self, command: list[str]) -> Result:
        return run(self._inside("h1", NAMES[self._kind][0], ["/usr/bin/env", *VARIABLES, *command]), deadline=200)


def assert_trains_on_workers(job: PodJob, curve: dict[int, float]) -> None:
    """The job's own command does, by the losses of one process alone."""
    result = job.launch(job.command)
    assert result.status == 0, result.output
    assert "4 ranks on 2 nodes" in result.output
    assert_same_curve(losses(job.run_dir), curve, relative=1e-4)


@contextmanager
def pod_job(kind: str, image: Image, bin: Path, hosts: Cluster, data: Path, volume: Path) -> Iterator[PodJob]:
    """A job that trains on a copy of `data`, whose workers are up within."""
    shutil.copytree(data, volume / "data")
    with ExitStack() as stack:
        made = PodJob(kind, image, bin, hosts, volume, stack)
        made.write()
        shutil.chown(volume, 1000, 1000)
        made.start_workers()
        yield made
        hosts.end_jobs(patience=0)
    for left in (image.disk / "pods", made.files):
        shutil.rmtree(left)
