"""What the pods of a job have in common: settings, volumes, user, shared memory, and what each runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

# As examples/kubernetes/Containerfile has them
HOME = "/home/hvdlm"
USER = 1000
SSH_PORT = 2222
SSHD = ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_hvdlm"]

# Where operators put the host list, and where this file puts the settings
HOSTFILE = "/etc/mpi/hostfile"
SETTINGS = PurePosixPath("/etc/hvdlm/config.toml")

# Of the first pods, names are known to DNS only a moment later
_SSH_ARGUMENTS = "-o ConnectionAttempts=10"

# What namespaces with Pod Security "restricted" want of a container
_RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

_OF_LAUNCHER = {"cpu": "500m", "memory": "512Mi"}  # mpirun alone


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim, and where all pods see it."""

    claim: str
    path: PurePosixPath


@dataclass(frozen=True)
class Pods:
    """The pods of a job: a launcher, which runs mpirun, and workers, on which ranks are started by ssh."""

    name: str
    image: str
    bin: PurePosixPath
    """Where the image has mpirun and hvdlm."""
    nodes: int
    ranks_per_node: int
    gpus_per_rank: int
    cpus_per_rank: int
    memory: str
    """Of a node, as Kubernetes writes it, or empty for no limit."""
    volumes: tuple[Volume, ...]

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def settings_map(self, settings: str) -> dict[str, Any]:
        """The ConfigMap that holds the TOML text of all settings."""
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": self._settings_name},
            "data": {SETTINGS.name: settings},
        }

    @property
    def command(self) -> list[str]:
        """What the launcher runs.

        The operators' environment names the host list by variables of Open MPI 4 alone, which Open MPI 5 does not
        know: it would start all ranks in the launcher's pod. The option is the same for both; what ssh is given, the
        operators say to Open MPI 4.
        """
        mpirun = [str(self.bin / "mpirun"), "-np", str(self.ranks), "--hostfile", HOSTFILE, "--bind-to", "none"]
        train = [str(self.bin / "hvdlm"), "train", str(SETTINGS), "--resume", "latest"]
        return ["/usr/bin/env", f"PRTE_MCA_plm_ssh_args={_SSH_ARGUMENTS}", *mpirun, *train]

    def launcher(self, container: str) -> dict[str, Any]:
        """The specification of the launcher's pod, whose container has this name."""
        resources = {"requests": _OF_LAUNCHER, "limits": _OF_LAUNCHER}
        return self._pod({"name": container, "image": self.image, "command": self.command, "resources": resources})

    def worker(self, container: str) -> dict[str, Any]:
        """The same of a worker's. It is ready when its sshd listens."""
        limits: dict[str, Any] = {"cpu": self.cpus_per_rank * self.ranks_per_node}
        if self.memory:
            limits["memory"] = self.memory
        if self.gpus_per_rank:
            limits["nvidia.com/gpu"] = self.gpus_per_rank * self.ranks_per_node
        probe = {"tcpSocket": {"port": SSH_PORT}, "periodSeconds": 2}
        resources = {"requests": limits, "limits": limits}
        return self._pod(
            {"name": container, "image": self.image, "command": SSHD, "readinessProbe": probe, "resources": resources}
        )

    @property
    def _settings_name(self) -> str:
        return f"{self.name}-settings"

    def _pod(self, container: dict[str, Any]) -> dict[str, Any]:
        """Open MPI and data loaders need more shared memory than the 64 MiB that containers have."""
        volumes: list[dict[str, Any]] = [
            {"name": "settings", "configMap": {"name": self._settings_name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ]
        mounts: list[dict[str, Any]] = [
            {"name": "settings", "mountPath": str(SETTINGS.parent), "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ]
        for number, volume in enumerate(self.volumes):
            volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": volume.claim}})
            mounts.append({"name": f"volume-{number}", "mountPath": str(volume.path)})
        return {
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",  # not file by file at each start
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{**container, "securityContext": _RESTRICTED, "volumeMounts": mounts}],
            "volumes": volumes,
        }
