"""`hvdlm kubernetes`: the objects that it writes, against the schemas of who takes them, and what it refuses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Literal

import kubeflow_trainer_api.models as kubeflow
import pytest
import yaml
from forked import hvdlm
from launcher import BIN
from pydantic import BaseModel, ConfigDict

from hvdlm.config_reader import load
from hvdlm.model.presets import PRESETS

CHECKOUT = Path(__file__).parents[2]
CONTAINERFILE = CHECKOUT / "examples/kubernetes/Containerfile"
OPTIONS = ["--image", "registry.example/hvdlm:1", "--nodes", "3", "--ranks-per-node", "2", "--volume", "shared:/shared"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# The fields of an MPIJob that there are, from mpi-operator's pkg/apis/kubeflow/v2beta1/types.go. A pod template is
# checked by Kubernetes' own schema.


class Replicas(Strict):
    replicas: int
    restartPolicy: Literal["Never", "OnFailure"]
    template: dict[str, Any]


class RunPolicy(Strict):
    cleanPodPolicy: Literal["None", "Running", "All"]
    backoffLimit: int


class MPIJobSpec(Strict):
    slotsPerWorker: int
    runLauncherAsWorker: bool = False
    runPolicy: RunPolicy
    mpiReplicaSpecs: dict[Literal["Launcher", "Worker"], Replicas]
    sshAuthMountPath: str
    launcherCreationPolicy: Literal["AtStartup", "WaitForWorkersReady"]
    mpiImplementation: Literal["OpenMPI", "Intel", "MPICH"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text('data.path = "/shared/data"\n[train]\nrun_dir = "/shared/runs/Mine_1"\nsteps = 700\n')
    return file


def objects(config: Path, *words: str) -> dict[str, dict[str, Any]]:
    """By kind."""
    result = hvdlm("kubernetes", config, *OPTIONS, *words, cwd=config.parent)
    assert result.returncode == 0, result.stderr
    return {each["kind"]: each for each in yaml.safe_load_all(result.stdout)}


def assert_is(model: Any, content: dict[str, Any]) -> None:
    """That content has the fields of a model, and no other: a model drops what it does not know."""
    assert model.from_dict(content).to_dict() == content


def assert_is_pod(spec: dict[str, Any]) -> None:
    assert_is(kubeflow.IoK8sApiCoreV1PodSpec, spec)


@pytest.mark.parametrize("words", [(), ("--memory", "8Gi", "--gpus-per-rank", "1", "--cpus-per-rank", "4")])
def test_an_mpi_job_is_what_its_operator_takes(config: Path, words: tuple[str, ...]) -> None:
    job = objects(config, *words)["MPIJob"]
    assert job["apiVersion"] == "kubeflow.org/v2beta1" and job["metadata"] == {"name": "mine-1"}
    spec = MPIJobSpec.model_validate(job["spec"])
    assert (spec.slotsPerWorker, spec.mpiReplicaSpecs["Launcher"].replicas) == (2, 1)
    assert spec.mpiReplicaSpecs["Worker"].replicas == 3
    for replicas in spec.mpiReplicaSpecs.values():
        assert_is(kubeflow.IoK8sApiCoreV1PodTemplateSpec, replicas.template)


@pytest.mark.parametrize("words", [(), ("--memory", "8Gi", "--gpus-per-rank", "1", "--cpus-per-rank", "4")])
def test_a_train_job_is_what_its_trainer_takes(config: Path, words: tuple[str, ...]) -> None:
    found = objects(config, "--kind", "trainjob", *words)
    runtime, job = found["TrainingRuntime"], found["TrainJob"]
    assert_is(kubeflow.TrainerV1alpha1TrainingRuntime, runtime)
    assert_is(kubeflow.TrainerV1alpha1TrainJob, job)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert runtime["spec"]["mlPolicy"]["mpi"]["numProcPerNode"] == 2
    assert runtime["spec"]["mlPolicy"]["numNodes"] == 1  # which the trainer makes of the launcher
    assert job["spec"]["trainer"]["numNodes"] == 3  # and of workers
    node, launcher = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert launcher["dependsOn"] == [{"name": node["name"], "status": "Ready"}]
    for each in (node, launcher):  # only in containers of this name the trainer puts keys and host list
        assert [container["name"] for container in pod_of(each)["containers"]] == ["node"]


def pod_of(replicated_job: dict[str, Any]) -> Any:
    return replicated_job["template"]["spec"]["template"]["spec"]


def test_this_test_sees_unknown_fields(config: Path) -> None:
    job = objects(config)["MPIJob"]
    pod = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
    assert_is_pod(pod)
    pod["containers"][0]["readyProbe"] = {}
    with pytest.raises(AssertionError):
        assert_is_pod(pod)
    with pytest.raises(ValueError, match="slotsPerNode"):
        MPIJobSpec.model_validate({**job["spec"], "slotsPerNode": 2})


@pytest.mark.parametrize("kind", ["mpijob", "trainjob"])
def test_the_settings_refuse_a_job_that_comes_up_short(config: Path, kind: str, tmp_path: Path) -> None:
    found = objects(config, "--kind", kind, "--train.seed", "5")
    (tmp_path / "job.toml").write_text(found["ConfigMap"]["data"]["config.toml"])
    train = load(tmp_path / "job.toml", [], PRESETS).train
    assert (train.ranks, train.nodes, train.steps, train.seed) == (6, 3, 700, 5)


def test_all_ranks_are_on_the_hosts_of_the_operator_s_list(config: Path) -> None:
    """By an option, which Open MPI 4 and 5 have alike."""
    job = objects(config)["MPIJob"]
    command = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--hostfile") + 1] == "/etc/mpi/hostfile"
    assert command[command.index("-np") + 1] == "6"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.path", "data/here"], "data.path = 'data/here' is on no volume (/shared)"),
        (["--train.run_dir", "/runs"], "train.run_dir = '/runs' is on no volume (/shared)"),
        (["--train.ranks", "8"], "train.ranks = 8, but the job has 6"),
        (["--train.nodes", "2"], "train.nodes = 2, but the job has 3"),
        (["--nodes", "0"], "--nodes, --ranks-per-node and --cpus-per-rank are 1 or more"),
        (["--gpus-per-rank", "2"], "--gpus-per-rank 2: a rank computes on one GPU"),
        (["--train.device", "cuda"], "train.device = 'cuda' does not go with --gpus-per-rank 0"),
        (["--data.path", "/shared/../data"], "data.path = '/shared/../data' is on no volume (/shared)"),
        (["--memory", "64GB"], "--memory '64GB': write it as Kubernetes does"),
        (["--image", ""], "--image names an image"),
        (["--bin", "bin"], "and --bin a directory in it, from its root on"),
        (["--volume", "other:/shared/"], "two volumes are to be at one path"),
        (["--volume", "other:/dev/shm"], "--volume 'other:/dev/shm': pods have files of their own there"),
        (["--volume", "other:/home"], "--volume 'other:/home': pods have files of their own there"),
        (["--volume", "Other:/o"], "--volume 'Other:/o': write CLAIM:PATH"),
        (["--volume", "shared"], "--volume 'shared': write CLAIM:PATH"),
        (["--name", "Mine"], "--name 'Mine': give up to 40 small letters"),
        (["--name", "m" * 41], "give up to 40 small letters"),
        (["--comm.elastic", "true"], "comm.elastic: "),
    ],
)
def test_what_is_refused(config: Path, words: list[str], sentence: str, tmp_path: Path) -> None:
    output = tmp_path / "job.yaml"
    result = hvdlm("kubernetes", config, *OPTIONS, "--output", output, *words, cwd=tmp_path)
    assert result.returncode == 1
    assert sentence in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not output.exists()


def test_an_output_that_is_there_is_kept(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "job.yaml"
    assert hvdlm("kubernetes", config, *OPTIONS, "--output", output, cwd=tmp_path).returncode == 0
    before = output.read_text()
    result = hvdlm("kubernetes", config, *OPTIONS, "--output", output, cwd=tmp_path)
    assert result.returncode == 1 and f"{output} exists" in result.stderr
    assert output.read_text() == before


def test_an_output_that_cannot_be_is_one_sentence(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = hvdlm("kubernetes", config, *OPTIONS, "--output", tmp_path / "file" / "job.yaml", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith(f"hvdlm: error: cannot write {tmp_path}/file/job.yaml: ")


def test_the_image_has_what_building_horovod_needs() -> None:
    """What `hvdlm.cluster.horovod_build.toolchain` looks for: a C++ compiler, make and git."""
    (packages,) = re.findall(r"apt-get install .*?&& rm", CONTAINERFILE.read_text(), flags=re.DOTALL)
    assert {"g++", "make", "git", "python3-dev", "python3-venv", "openssh-server"} <= set(packages.split())


def test_the_containerfile_is_clean() -> None:
    """DL3008 wants versions of Debian's packages, which mirrors delete as soon as there are newer ones."""
    words = [str(BIN / "hadolint"), "--ignore", "DL3008", str(CONTAINERFILE)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
