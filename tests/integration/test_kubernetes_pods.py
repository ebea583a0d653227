"""What `hvdlm kubernetes` writes, rehearsed: pods without root on an emulated cluster, with keys, host list and
variables as the operators set them up, under the Open MPI 5 that is installed here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from disks import small_disk
from jobs import SETTINGS, assert_same_curve, losses
from launcher import BIN, Result, run, start
from pods import HOME, Image
from waiting import wait_for

from hvdlm.cluster.fabric.network import address

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


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Without what needs a network: packages are this machine's, and hvdlm that which is tested."""
    disk = tmp_path_factory.mktemp("image")
    with small_disk(disk, "2g"):
        yield Image(disk, leave_out=("apt-get", "/opt/hvdlm"))


@pytest.fixture(scope="module")
def hosts(image: Image, start_cluster: Callable[..., Cluster]) -> Cluster:
    """Begun after the image, whose file system they then see."""
    return start_cluster(3, 2)


class Job:
    """The pods of a job, of which workers are up."""

    def __init__(self, kind: str, image: Image, hosts: Cluster, volume: Path, stack: ExitStack) -> None:
        self._kind, self._image, self._hosts, self._volume, self._stack = kind, image, hosts, volume, stack
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
        options += ["--kind", self._kind, "--name", "rehearsal", "--bin", str(BIN)]
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


@pytest.fixture(params=NAMES)
def job(
    request: pytest.FixtureRequest, image: Image, hosts: Cluster, small_data: Path, tmp_path: Path
) -> Iterator[Job]:
    volume = tmp_path / "volume"
    shutil.copytree(small_data, volume / "data")
    with ExitStack() as stack:
        made = Job(request.param, image, hosts, volume, stack)
        made.write()
        shutil.chown(volume, 1000, 1000)
        made.start_workers()
        yield made
        hosts.end_jobs(patience=0)
    for left in (image.disk / "pods", made.files):
        shutil.rmtree(left)


@pytest.mark.needs_root
def test_a_job_trains_on_the_workers(job: Job, curve_alone: dict[int, float], tmp_path: Path) -> None:
    result = job.launch(job.command)
    assert result.status == 0, result.output
    assert "4 ranks on 2 nodes" in result.output
    (run_dir,) = {path.parent for path in (tmp_path / "volume").glob("*/metrics.jsonl")}
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)


@pytest.mark.needs_root
def test_a_job_that_comes_up_short_ends_with_the_cause(job: Job) -> None:
    """By mpirun that goes by the operators' variables alone, which Open MPI 5 does not know; and by a list without one
    of the workers."""
    mpirun, train = job.command[2], job.command[job.command.index("train") - 1 :]
    result = job.launch([mpirun, "-np", "4", "--oversubscribe", *train])
    assert result.status != 0
    said = r"train.nodes = 2, but 4 ranks were started, on 1 node: name all hosts"
    assert re.search(said, result.output), result.output
    result = job.launch([mpirun, "-np", "2", *train])
    assert result.status != 0
    assert re.search(r"train.ranks = 4, but 2 ranks were started, on 1 node: name as many", result.output), (
        result.output
    )
    hostfile = job.files / "etc/mpi/hostfile"
    hostfile.write_text(hostfile.read_text().splitlines()[0] + "\n")
    result = job.launch(job.command)
    assert result.status != 0
    assert "not enough slots" in result.output, result.output


@pytest.mark.thorough
@pytest.mark.needs_root
@pytest.mark.timeout(1500)
def test_all_steps_of_the_containerfile(tmp_path: Path) -> None:
    """Over this machine's file system and network: in the end user 1000 has ranks that can train."""
    disk = tmp_path / "disk"
    with small_disk(disk, "12g"):
        image = Image(disk)
        ranks = "/opt/hvdlm/.venv/bin/mpirun -np 2 --bind-to none --oversubscribe /opt/hvdlm/.venv/bin/hvdlm doctor"
        image.run(f"su hvdlm --command {shlex.quote(ranks)}")
