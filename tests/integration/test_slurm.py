"""Jobs of `hvdlm slurm` under a real Slurm on two hosts: they train, requeue themselves, and end when they should."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import SETTINGS, assert_same_curve, losses
from launcher import BIN, Result
from small_study import write_study
from thorough import thorough
from waiting import wait_for

from hvdlm.cluster.fabric import programs
from hvdlm.errors import HvdlmError
from hvdlm.scaling.point import read_points

# Starting a rank takes some seconds, on a busy machine a minute, and jobs of these tests start up to four times
pytestmark = [pytest.mark.needs_slurm, pytest.mark.timeout(600)]
DEADLINE = 200  # seconds that a job may take


class Queue:
    """Slurm on the hosts of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._inside_h1 = programs.nsenter(cluster.first_process("h1"), ["net", "uts", "mount", "pid"])

    def command(self, *words: str, host: str = "h1") -> Result:
        """Runs a command in a host, and lets whatever it has started live on."""
        return self.cluster.run(host, words, may_go_on=True)

    def run(self, *words: str, host: str = "h1") -> str:
        result = self.command(*words, host=host)
        assert result.status == 0, result.output
        return result.output.strip()

    def ask(self, *words: str) -> str:
        """A short question to Slurm, or an order."""
        command = [*self._inside_h1, *words]
        try:
            return programs.run(*command).strip()
        except HvdlmError as error:
            if "exit status -13" not in str(error):
                raise
            # SIGPIPE: a busy controller has closed the connection before the question was written
            return programs.run(*command).strip()

    def sbatch(self, job: Path) -> str:
        return self.run("sbatch", "--parsable", str(job / "job.sh"))

    def state(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str) -> dict[str, str]:
        """The state in which a job has left the queue, for good."""
        wait_for(lambda: not self.ask("squeue", "--noheader", "--jobs", number), DEADLINE, f"end of job {number}")
        return self.state(number)


@pytest.fixture
def queue(cluster: Cluster) -> Iterator[Queue]:
    """Slurm with all nodes idle; no job outlives its test."""
    queue = Queue(cluster)
    wait_for(lambda: queue.ask("sinfo", "--noheader", "--format", "%T") == "idle", DEADLINE, "idle nodes")
    yield queue
    queue.ask("scancel", "--user=root")
    wait_for(lambda: not queue.ask("squeue", "--noheader"), DEADLINE, "empty queue")


def write(data: Path, run_dir: Path, *options: str, **overrides: object) -> Path:
    """`hvdlm slurm` for one rank on each of two nodes; `overrides` have `__` for the dot. Returns its directory."""
    config = run_dir.with_name("empty.toml")
    config.write_text("")
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
    """What a job has said so far."""
    file = job / f"slurm-{number}.out"
    return file.read_text() if file.exists() else ""


@contextmanager
def no_ssh(queue: Queue) -> Iterator[None]:
    """As on many clusters: the second host lets nobody in."""
    queue.run("mount", "--bind", "/dev/null", "/etc/ssh/authorized_keys", host="h2")
    try:
        assert queue.command("ssh", "-o", "BatchMode=yes", "h2", "true").status == 255
        yield
    finally:
        queue.run("umount", "/etc/ssh/authorized_keys", host="h2")


@pytest.mark.parametrize("launcher", ["srun", "horovodrun"])
def test_launchers(
    launcher: str, queue: Queue, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]
) -> None:
    """mpirun is in the next test, and in test_readme.py."""
    run_dir = tmp_path / "a run"
    job = write(small_data, run_dir, "--launcher", launcher, train__steps=20)
    with no_ssh(queue) if launcher == "srun" else nullcontext():
        number = queue.sbatch(job)
        state = queue.wait(number)
    output = log(job, number)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert "2 ranks on 2 nodes" in output
    assert output.endswith("hvdlm: done: the newest checkpoint is of step 20\n")
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)


# Steps so long that a signal comes within a few of them
SLOW = {"model__layers": 4, "model__width": 128, "model__context_length": 128, "train__micro_batch_size": 16}


def steps_done(run_dir: Path) -> int:
    return max(losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def test_longer_than_its_limit(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    """Its limit is made shorter in two of three starts; its curve is the same bit for bit as without."""
    steps = 30
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job_of_whole = write(small_data, whole, "--time", "30", train__steps=steps, **SLOW)
    job = write(small_data, parts, "--time", "30", "--sbatch=--signal=B:USR1@119", train__steps=steps, **SLOW)
    with no_ssh(queue):
        number_of_whole, number = queue.sbatch(job_of_whole), queue.sbatch(job)
        for start in (1, 2):
            stop_after_two_steps(queue, job, number, start, parts)
        state = queue.wait(number)
        state_of_whole = queue.wait(number_of_whole)
    output = log(job, number)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "2"), output
    assert output.count(f" of job {number}, from step ") == 3, output
    assert output.count("back into the queue") == 2
    assert output.count("2 ranks on 2 nodes") == 3
    assert output.endswith(f"hvdlm: done: the newest checkpoint is of step {steps}\n")
    assert state_of_whole["JobState"] == "COMPLETED", log(job_of_whole, number_of_whole)
    assert losses(parts) == losses(whole)
    assert len(losses(parts)) == steps
    last = [run_dir / "checkpoints" / f"step_{steps:08d}" / "model.safetensors" for run_dir in (whole, parts)]
    assert last[0].read_bytes() == last[1].read_bytes()


def stop_after_two_steps(queue: Queue, job: Path, number: str, start: int, run_dir: Path) -> None:
    """Shortens a job's limit in its start of that number, to the usual one again once it is back in the queue."""
    wait_for(lambda: f"start {start} of job {number}, from step " in log(job, number), DEADLINE, f"start {start}")
    before = steps_done(run_dir)
    wait_for(lambda: steps_done(run_dir) >= before + 2, DEADLINE, f"steps of start {start}")
    queue.ask("scontrol", "update", f"JobId={number}", "TimeLimit=2")
    queue.ask("scancel", "--batch", "--signal=USR1", number)  # as Slurm does from 119 s before the limit on
    wait_for(lambda: queue.state(number)["JobState"] == "PENDING", DEADLINE, f"requeuing after start {start}")
    queue.ask("scontrol", "update", f"JobId={number}", "TimeLimit=30")


def test_ranks_that_are_asked_before_they_are_ready(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    """horovodrun over Gloo passes no signal on; asked from its first second on, a start saves and makes room."""
    options = ["--launcher", "horovodrun", "--time", "1", "--sbatch=--signal=B:USR1@59"]
    job = write(small_data, tmp_path / "run", *options, train__steps=100_000, **SLOW)
    edit(job, "horovodrun -np", "horovodrun --gloo -np")
    number = queue.sbatch(job)
    again = re.compile(rf"start 2 of job {number}, from step (\d+);")
    wait_for(lambda: again.search(log(job, number)) is not None, DEADLINE, "second start")
    queue.ask("scancel", "--batch", "--signal=TERM", number)  # to save and stop, however long that takes
    assert queue.wait(number)["ExitCode"] == "75:0", log(job, number)
    output = log(job, number)
    (step,) = again.findall(output)
    assert int(step) > 0
    assert f"stopped before the limit, from step 0 to {step}: back into the queue, to go on from there" in output


def test_a_job_that_gets_nowhere_ends_after_two_starts(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    job = write(small_data, tmp_path / "run")
    edit(job, 'train=("$python" -m hvdlm train', "train=(bash -c 'exit 75'")
    number = queue.sbatch(job)
    state = queue.wait(number)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "75:0", "1")
    last = log(job, number).splitlines()[-1]
    assert last.startswith("hvdlm: error: 2 starts in a row have not got beyond step 0, so this job ends")


DYING = Path(__file__).parents[1] / "faults" / "dying.py"
ELASTIC = {"comm__elastic": "true", "train__steps": 20}


def let_rank_1_die(job: Path, step: int) -> None:
    """In the forward pass after so many steps, in the job's first start."""
    edit(job, 'train=("$python" -m hvdlm train', f'train=("$python" {shlex.quote(str(DYING))} forward:{step}:1 train')


def run_to_its_end(queue: Queue, job: Path, restarts: int) -> str:
    """What a job has said that was done after so many restarts."""
    number = queue.sbatch(job)
    state = queue.wait(number)
    output = log(job, number)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), output
    return output


def test_a_rank_of_an_elastic_job_dies(
    queue: Queue, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]
) -> None:
    """The other goes on, in the same start."""
    run_dir = tmp_path / "run"
    job = write(small_data, run_dir, **ELASTIC)
    let_rank_1_die(job, 7)
    output = run_to_its_end(queue, job, restarts=0)
    assert "rank 1 on h2 has died: 1 ranks go on from step 7" in output
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)


def test_too_few_ranks_of_an_elastic_job_are_left(
    queue: Queue, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]
) -> None:
    """They save, and Slurm starts all ranks again."""
    run_dir = tmp_path / "run"
    job = write(small_data, run_dir, comm__min_ranks=2, **ELASTIC)
    let_rank_1_die(job, 7)
    output = run_to_its_end(queue, job, restarts=1)
    assert "stopped with status 75, from step 0 to 7: back into the queue" in output
    assert output.count("2 ranks on 2 nodes") == 2
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)


@pytest.mark.parametrize("option", ["--kill-on-bad-exit=1", thorough("--kill-on-bad-exit=0")])
def test_a_rank_under_srun_dies(
    option: str, queue: Queue, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]
) -> None:
    """Slurm ends the others, and starts all again from the last checkpoint."""
    run_dir = tmp_path / "run"
    job = write(small_data, run_dir, "--launcher", "srun", checkpoint__every=2, train__steps=20)
    edit(job, "--kill-on-bad-exit=1", option)
    let_rank_1_die(job, 7)
    output = run_to_its_end(queue, job, restarts=1)
    assert re.search(r"failed with status \d+, from step 0 to [246]: back into the queue", output), output
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)


def test_another_version_of_hvdlm(queue: Queue, small_data: Path, tmp_path: Path) -> None:
    job = write(small_data, tmp_path / "run")
    edit(job, "\nversion=", "\nversion=9.")
    number = queue.sbatch(job)
    assert queue.wait(number)["ExitCode"] == "1:0"
    assert log(job, number).startswith("hvdlm: error: hvdlm 9.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["mpirun", thorough("srun")])
def test_cancelled(launcher: str, queue: Queue, small_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = write(small_data, run_dir, "--launcher", launcher, train__steps=100000, log__every=1, **SLOW)
    number = queue.sbatch(job)
    wait_for(lambda: steps_done(run_dir) >= 3, DEADLINE, "steps")
    queue.ask("scancel", number)
    state = queue.wait(number)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    step = max(losses(run_dir))
    saved = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    assert saved["step"] == step
    # Where TERM names a terminal, mpirun writes codes for it at its end
    last = log(job, number).splitlines()[-1].replace("\x1b[0m", "")
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
    # As inside another job: with both of the first, srun ends; with the third it binds all ranks to one core
    inside = ["SLURM_MEM_PER_CPU=100", "SLURM_MEM_PER_NODE=200", "SLURM_CPU_BIND=mask_cpu:0x1", "PMIX_RANK=0"]
    accepted = queue.run("env", *inside, *words, "--launcher", "srun", "--output", str(tmp_path / "other"))
    number = accepted.partition("submitted as job ")[2].partition(";")[0]
    assert queue.wait(number)["JobState"] == "COMPLETED", log(tmp_path / "other", number)
    again = queue.sbatch(job)
    assert queue.wait(again)["JobState"] == "COMPLETED"
    assert "from step 20; " in log(job, again)
    unknown = queue.command(*words, "--output", str(tmp_path / "third"), "--sbatch=--partition=gpu")
    assert unknown.status == 1
    assert "invalid partition specified: gpu" in unknown.output


@pytest.mark.parametrize(("launcher", "ranks"), [thorough("mpirun", [1, 2]), ("srun", [2])])
def test_a_scaling_study_in_an_allocation(
    launcher: str, ranks: list[int], queue: Queue, small_data: Path, tmp_path: Path
) -> None:
    study = shlex.join(write_study(tmp_path, small_data, place="slurm", launcher=launcher, ranks=ranks))
    job = f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output={tmp_path}/slurm-%j.out\nexec {study}\n"
    (tmp_path / "job.sh").write_text(job)
    number = queue.sbatch(tmp_path)
    state = queue.wait(number)
    assert state["JobState"] == "COMPLETED", log(tmp_path, number)
    points = {point.ranks: point for point in read_points(tmp_path / "small-strong")}
    assert {number: point.place.hosts for number, point in points.items()} == {
        number: ["h1", "h2"][:number] for number in ranks
    }
    assert points[2].is_valid and points[2].place.launcher.startswith(launcher)
