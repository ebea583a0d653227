"""The objects that are a job: an MPIJob of the MPI Operator, or a TrainJob of Kubeflow Trainer and its runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdlm.cluster.kubernetes.pods import HOME, Pods

# A launcher that fails is followed by a new one (restartPolicy Never) `backoffLimit` times, and its log stays. One that
# is started again in its pod (OnFailure) is killed as it begins for the last time, and its log is lost.
_KEYS = f"{HOME}/.ssh"
_OPEN_MPI = "OpenMPI"


def mpi_job(pods: Pods, restarts: int) -> list[dict[str, Any]]:
    """For the MPI Operator (v2beta1), which makes keys and the host list, and starts mpirun when all workers listen."""
    return [
        {
            "apiVersion": "kubeflow.org/v2beta1",
            "kind": "MPIJob",
            "metadata": {"name": pods.name},
            "spec": {
                "slotsPerWorker": pods.ranks_per_node,
                "mpiImplementation": _OPEN_MPI,
                "launcherCreationPolicy": "WaitForWorkersReady",
                "sshAuthMountPath": _KEYS,
                "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": restarts},
                "mpiReplicaSpecs": {
                    "Launcher": {
                        "replicas": 1,
                        "restartPolicy": "Never",
                        "template": {"spec": pods.launcher("launcher")},
                    },
                    "Worker": {
                        "replicas": pods.nodes,
                        "restartPolicy": "OnFailure",
                        "template": {"spec": pods.worker("worker")},
                    },
                },
            },
        }
    ]


def train_job(pods: Pods, restarts: int) -> list[dict[str, Any]]:
    """For Kubeflow Trainer (v1alpha1). It has no runtime for MPI of its own any more, so the job brings one."""
    runtime = f"{pods.name}-runtime"
    launcher = {
        "name": "launcher",
        "dependsOn": [{"name": "node", "status": "Ready"}],
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {
                "backoffLimit": restarts,
                "template": {"spec": {"restartPolicy": "Never", **pods.launcher("node")}},
            },
        },
    }
    return [
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainingRuntime",
            "metadata": {"name": runtime},
            "spec": {
                "mlPolicy": {
                    "numNodes": 1,  # of launchers; that of workers is the TrainJob's
                    "mpi": {
                        "numProcPerNode": pods.ranks_per_node,
                        "mpiImplementation": _OPEN_MPI,
                        "sshAuthMountPath": _KEYS,
                        "runLauncherAsNode": False,
                    },
                },
                "template": {
                    "spec": {
                        "network": {"publishNotReadyAddresses": True},
                        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["launcher"]},
                        "replicatedJobs": [
                            {"name": "node", "template": {"spec": {"template": {"spec": pods.worker("node")}}}},
                            launcher,
                        ],
                    }
                },
            },
        },
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": pods.name},
            "spec": {
                "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime},
                "trainer": {"numNodes": pods.nodes, "numProcPerNode": pods.ranks_per_node},
            },
        },
    ]


KINDS: dict[str, Callable[[Pods, int], list[dict[str, Any]]]] = {"mpijob": mpi_job, "trainjob": train_job}
