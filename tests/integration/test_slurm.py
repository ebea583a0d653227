"""Jobs of `hvdlm slurm` under a real Slurm on two hosts: they train, requeue themselves, and end when they should."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import SETTINGS, assert_same_curve, losses, records, train
from launcher import BIN, Result, environment
from small_study import write_study

from hvdlm.scaling.point import read_points


class Queue:
    """Slurm on the hosts of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def command(self, *words: str, host: str = "h1") -> Result:
        """Runs a command in a host, and lets whatever it has started live on."""
        inside = self.cluster.inside(host, words)
        done = subprocess.run(
            inside, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        return Result(done.returncode, done.stdout)

    def ask(self, *words: str, host: str = "h1") -> str:
        result = self.command(*words, host=host)
        assert result.status == 0, result.output
        return result.output.strip()

    def sbatch(self, job: Path) -> str:
        return self.ask("sbatch", "--parsable", str(job / "job.sh"))

    def state(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, deadline: float) -> dict[str, str]:
        """The state in which a job has left the queue, for good."""
        end = time.monotonic() + deadline
        while self.ask("squeue", "--noheader", "--jobs", number):
            assert time.monotonic() < end, f"job {number} is still in the queue"
            time.sleep(1)
        return self.state(number)


@pytest.fixture(scope="module")
def queue(start_cluster: Callable[..., Cluster]) -> Queue:
    return Queue(start_cluster(2, 2, "--slurm"))


@pytest.fixture(autouse=True)
def nothing_left(queue: Queue) -> Iterator[None]:
    """No job, and no process of one, outlives its test."""
    yield
    queue.ask("scancel", "--user=root")
    assert queue.cluster.end_jobs() == []


def write(data: Path, run_dir: Path, *options: str, **overrides: object) -> Path:
    """`hvdlm slurm` for one rank on each of two nodes; `overrides` have `__` for the dot. Returns its directory."""
    config = run_dir.with_name("empty.toml")
    config.touch()
    settings = {**SETTINGS, "data.path": data, "train.run_dir": run_dir}
    settings.update({name.replace("__", "."): value for name, value in overrides.items()})
    words = [str(BIN / "hvdlm"), "slurm", str(config), "--nodes", "2", "--ranks-per-node", "1", *options]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    subprocess.run(words, check=True)
    return run_dir.with_name(run_dir.name + ".slurm")


def edit(job: Path, old: str, new: str) -> None:
    script = job / "job.sh"
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))


def log(job: Path, number: str) -> str:
    return (job / f"slurm-{number}.out").read_text()


@contextmanager
def no_ssh(queue: Queue) -> Iterator[None]:
    """As on many clusters: the second host lets nobody in."""
    queue.ask("mount", "--bind", "/dev/null", "/etc/ssh/authorized_keys", host="h2")
    try:
        assert queue.command("ssh", "-o", "BatchMode=yes", "h2", "true").status == 255
        yield
    finally:
        queue.ask("umount", "/etc/ssh/authorized_keys", host="h2")


@pytest.fixture(scope="module")
def expected(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process alone."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = train("none", 1, small_data, run_dir, train__steps=20)
    assert result.status == 0, result.output
    return losses(run_dir)


@pytest.mark.parametrize("launcher", ["mpirun", "srun", "horovodrun"])
def test_launchers(launcher: str, queue: Queue, small_data: Path, tmp_path: Path, expected: dict[int, float]) -> None:
    run_dir = tmp_path / "a run"
    job = write(small_data, run_dir, "--launcher", launcher, train__steps=20)
    if launcher == "horovodrun":
        number = queue.sbatch(job)
        state = queue.wait(number, 120)
    else:
        with no_ssh(queue):
            number = queue.sbatch(job)
            state = queue.wait(number, 120)
    output = log(job, number)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert "2 ranks on 2 nodes" in output
    assert output.endswith("hvdlm: done: the newest checkpoint is of step 20\n")
    assert_same_curve(losses(run_dir), expected, relative=1e-4)


# Steps long enough that a start of twenty seconds holds few of them.
SLOW = {"model__layers": 4, "model__width": 128, "model__context_length": 128, "train__micro_batch_size": 16}


@pytest.mark.timeout(700)  # on a busy machine there are more starts
def test_longer_than_its_limit(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    """Asked to stop 40 s before a limit of one minute, for a training of 40 s: three starts or more, and one curve."""
    timing = tmp_path / "timing"
    assert train("mpirun", 2, small_data, timing, train__steps=10, **SLOW).status == 0
    steps = round(40 / statistics.median(float(str(record["step_seconds"])) for record in records(timing)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = write(small_data, whole, "--time", "30", train__steps=steps, **SLOW)
    number = queue.sbatch(job)
    assert queue.wait(number, 200)["JobState"] == "COMPLETED", log(job, number)

    job = write(small_data, parts, "--time", "1", "--sbatch=--signal=B:USR1@40", train__steps=steps, **SLOW)
    number = queue.sbatch(job)
    state = queue.wait(number, 450)
    output = log(job, number)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), output
    starts = output.count(f" of job {number}, from step ")
    assert starts >= 3, output
    assert int(state["Restarts"]) == starts - 1
    assert output.count("back into the queue") == starts - 1
    assert output.endswith(f"hvdlm: done: the newest checkpoint is of step {steps}\n")
    assert losses(parts) == losses(whole)
    assert len(losses(parts)) == steps
    last = [run_dir / "checkpoints" / f"step_{steps:08d}" / "model.safetensors" for run_dir in (whole, parts)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_ranks_that_are_asked_before_they_are_ready(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    """horovodrun over Gloo passes no signal on; asked from its first second on, a start saves and makes room."""
    options = ["--launcher", "horovodrun", "--time", "1", "--sbatch=--signal=B:USR1@59"]
    job = write(small_data, tmp_path / "run", *options, train__steps=100_000, **SLOW)
    edit(job, "horovodrun -np", "horovodrun --gloo -np")
    number = queue.sbatch(job)
    deadline = time.monotonic() + 150
    again = re.compile(rf"start 2 of job {number}, from step (\d+);")
    while not (job / f"slurm-{number}.out").exists() or not again.search(log(job, number)):
        assert time.monotonic() < deadline, log(job, number)
        time.sleep(0.5)
    queue.ask("scancel", number)
    output = log(job, number)
    step = again.search(output)[1]  # type: ignore[index]
    assert int(step) > 0
    assert f"stopped before the limit, from step 0 to {step}: back into the queue, to go on from there" in output


def test_a_job_that_gets_nowhere_ends_after_two_starts(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    job = write(small_data, tmp_path / "run")
    edit(job, 'train=("$python" -m hvdlm train', "train=(bash -c 'exit 75'")
    number = queue.sbatch(job)
    state = queue.wait(number, 90)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "75:0", "1")
    last = log(job, number).splitlines()[-1]
    assert last.startswith("hvdlm: error: 2 starts in a row have not got beyond step 0, so this job ends")


def test_another_version_of_hvdlm(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    job = write(small_data, tmp_path / "run")
    edit(job, "\nversion=", "\nversion=9.")
    number = queue.sbatch(job)
    assert queue.wait(number, 60)["ExitCode"] == "1:0"
    assert log(job, number).startswith("hvdlm: error: hvdlm 9.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_cancelled(launcher: str, queue: Queue, small_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = write(small_data, run_dir, "--launcher", launcher, train__steps=100000, log__every=1, **SLOW)
    number = queue.sbatch(job)
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 3:
        assert time.monotonic() < deadline, log(job, number)
        time.sleep(0.1)
    queue.ask("scancel", number)
    state = queue.wait(number, 60)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    step = max(losses(run_dir))
    saved = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    assert saved["step"] == step
    last = log(job, number).splitlines()[-1]
    assert last.startswith(
        f"hvdlm: stopped by SIGTERM (scancel or preemption): the newest checkpoint is of step {step};"
    )


def test_a_job_that_is_there_is_not_overwritten_and_can_be_submitted_again(
    queue: Queue, small_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = write(small_data, run_dir, train__steps=20)
    words = ["hvdlm", "slurm", str(job / "config.toml"), "--nodes", "1", "--ranks-per-node", "2", "--submit"]
    refused = queue.command(*words)
    assert refused.status == 1
    assert f"{job} exists: submit the job in it by `sbatch {job}/job.sh`" in refused.output
    accepted = queue.ask(*words, "--output", str(tmp_path / "other"))
    number = accepted.partition("submitted as job ")[2].partition(";")[0]
    assert queue.wait(number, 60)["JobState"] == "COMPLETED", log(tmp_path / "other", number)
    again = queue.sbatch(job)
    assert queue.wait(again, 60)["JobState"] == "COMPLETED"
    assert "from step 20; " in log(job, again)
    unknown = queue.command(*words, "--output", str(tmp_path / "third"), "--sbatch=--partition=gpu")
    assert unknown.status == 1
    assert "invalid partition specified: gpu" in unknown.output


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_a_scaling_study_in_an_allocation(launcher: str, queue: Queue, small_data: Path, tmp_path: Path) -> None:
    study = shlex.join(write_study(tmp_path, small_data, place="slurm", launcher=launcher))
    job = f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output={tmp_path}/slurm-%j.out\nexec {study}\n"
    (tmp_path / "job.sh").write_text(job)
    number = queue.sbatch(tmp_path)
    state = queue.wait(number, 180)
    assert state["JobState"] == "COMPLETED", log(tmp_path, number)
    one, two = sorted(read_points(tmp_path / "small-strong"), key=lambda point: point.ranks)
    assert (one.place.hosts, two.place.hosts) == (["h1"], ["h1", "h2"])
    assert two.is_valid and two.place.launcher.startswith(launcher)
