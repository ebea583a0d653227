"""`hvdlm slurm` and the supervisor of its job, with fake commands of Slurm and a fake launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import hvdlm
from launcher import BIN, Result, run, start
from launcher import Job as LaunchedJob

from hvdlm.cluster.slurm.start_log import StartLog, newest_checkpoint_step
from hvdlm.cluster.slurm.time_limit import default_lead, limit_seconds
from hvdlm.errors import HvdlmError
from hvdlm.training import checkpoint
from hvdlm.training.retention import Retention

STEPS = 100
CONFIG = "[train]\nsteps = 100\nrun_dir = 'runs/mine'\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", 60),
        ("90", 5400),
        ("2:30", 180),  # Slurm rounds up to minutes
        ("4:00:00", 14400),
        ("0:0:1", 60),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-01:01:01", 90120),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "four", "4h", "-5", "1:2:3:4", "1-2:3:4:5", "UNLIMITED", "00:00"])
def test_invalid_time_limits(text: str) -> None:
    with pytest.raises(HvdlmError, match="is no time limit"):
        limit_seconds(text)


def test_the_lead_fits_the_limit() -> None:
    assert [default_lead(limit) for limit in (60, 600, 1200, 86400)] == [15, 150, 300, 300]


def hvdlm_slurm(folder: Path, *options: str) -> Result:
    done = hvdlm("slurm", "config.toml", "--nodes", "2", "--ranks-per-node", "3", *options, cwd=folder)
    return Result(done.returncode, done.stdout + done.stderr)


@pytest.fixture
def folder(small_data: Path, tmp_path: Path) -> Path:
    """A directory with a configuration; its name has a blank."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "config.toml").write_text(f"{CONFIG}[data]\npath = '{small_data}'\n")
    return folder


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_what_is_written(launcher: str, folder: Path) -> None:
    options = ["--time", "2:00:00", "--launcher", launcher, "--sbatch=--partition=gpu", "--sbatch=--mem 4G"]
    result = hvdlm_slurm(folder, *options, "--train.seed", "7")
    job = folder / "runs" / "mine.slurm"
    assert result.status == 0, result.output
    assert f"submit it: sbatch '{job}/job.sh'" in result.output
    (folder / "config.toml").write_text("")  # later edits change nothing
    assert {path.name for path in job.iterdir()} == {"job.sh", "config.toml"}
    snapshot = (job / "config.toml").read_text()
    assert "seed = 7" in snapshot
    assert f'run_dir = "{folder}/runs/mine"' in snapshot
    script = (job / "job.sh").read_text()
    assert "%{" not in script
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        '--job-name="mine"',
        "--nodes=2",
        "--ntasks-per-node=3",
        "--time=2:00:00",
        "--requeue",
        "--open-mode=append",
        f'--output="{job}/slurm-%j.out"',
        "--signal=B:USR1@300",
        "--partition=gpu",
        "--mem 4G",
    ]
    assert run(["bash", "-n", str(job / "job.sh")]) == Result(0, "")


def test_gpus_and_a_chosen_lead(folder: Path) -> None:
    result = hvdlm_slurm(folder, "--gpus-per-rank", "1", "--sbatch=--signal=B:USR1@900", "--output", "here")
    assert result.status == 0, result.output
    script = (folder / "here" / "job.sh").read_text()
    assert "#SBATCH --gpus-per-node=3\n" in script
    assert "--lead 900 " in script
    assert script.rindex("#SBATCH --signal=B:USR1@900\n") > script.index("#SBATCH --time")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--train.stepz", "5"], "unknown key train.stepz (did you mean train.steps?)"),
        (["--data.path", "nowhere"], "nowhere: no such data set"),
        (["--time", "4h"], "--time '4h' is no time limit"),
        (["--nodes", "0"], "is no rank at all"),
        (["--gpus-per-rank", "2"], "a rank computes on one GPU"),
        (["--train.device", "cuda"], "train.device = 'cuda' does not go with --gpus-per-rank 0"),
        (["--sbatch=partition=gpu"], "'partition=gpu' is no option of sbatch"),
        (["--sbatch=--ntasks=9"], "--ntasks is set by --nodes and --ranks-per-node"),
        (["--sbatch=--signal=TERM@60"], "hvdlm saves at B:USR1@SECONDS"),
        (["--time", "1", "--sbatch=--signal=B:USR1@60"], "cannot save 60 s before its limit"),
        (["--comm.elastic", "true", "--launcher", "srun"], "comm.elastic = true goes with --launcher mpirun"),
        (["--comm.elastic", "true", "--comm.min_ranks", "7"], "comm.min_ranks = 7, but the job has 6 ranks"),
        (["--train.ranks", "8"], "train.ranks = 8, but the job has 6 ranks"),
        (["--output", "."], "exists: submit the job in it by `sbatch"),
    ],
)
def test_an_error_is_reported_and_nothing_is_written(options: list[str], sentence: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = hvdlm_slurm(folder, *options)
    assert result.status == 1
    assert "hvdlm: error: " in result.output
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before


def test_submitting_where_there_is_no_slurm(folder: Path) -> None:
    words = [str(BIN / "hvdlm"), "slurm", "config.toml", "--nodes", "1", "--ranks-per-node", "1", "--submit"]
    result = run(words, extra={"PATH": str(folder)}, cwd=folder)
    assert result.status == 1
    assert "sbatch is not on the PATH" in result.output
    assert not (folder / "runs").exists()


# What a process finds in its environment inside a step of srun's, under mpirun, horovodrun and torchrun.
INSIDE_A_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_CPU_BIND": "mask_cpu:0x1",
    "SLURM_CPU_BIND_LIST": "0x1",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_MEM_PER_NODE": "200",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURMD_NODENAME": "n1",
    "SBATCH_MEM_BIND": "local",
    "SBATCH_TIMELIMIT": "1",
    "PMI_RANK": "1",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-n1",
    "PMIX_SERVER_URI41": "prterun-n1;tcp4://10.0.0.1:40000",
    "PRTE_LAUNCHED": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "HOROVOD_RANK": "1",
    "HOROVOD_SIZE": "4",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "1",
}
# What users set for all their jobs.
OF_THE_USER = {
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "SBATCH_ACCOUNT": "physics",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_MCA_btl_tcp_if_include": "eth0",
    "HOROVOD_CYCLE_TIME": "2",
    "RANKS": "8",
}


def test_a_job_that_is_submitted_inside_another_gets_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/bash\nenv -0 > {tmp_path}/environment\necho 18\n")
    sbatch.chmod(0o755)
    words = ["config.toml", "--nodes", "2", "--ranks-per-node", "3", "--submit"]
    variables = {**INSIDE_A_JOB, **OF_THE_USER, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    done = hvdlm("slurm", *words, cwd=folder, **variables)
    assert done.returncode == 0, done.stderr
    assert "submitted as job 18" in done.stdout
    received = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().split("\0") if line)
    assert sorted(INSIDE_A_JOB.keys() & received.keys()) == []
    assert {name: received.get(name) for name in OF_THE_USER} == OF_THE_USER
    assert received["PATH"] == variables["PATH"]


def test_a_script_that_is_submitted_by_hand_inside_another_job_forgets_its_ranks(folder: Path) -> None:
    assert hvdlm_slurm(folder).status == 0
    text = (folder / "runs" / "mine.slurm" / "job.sh").read_text()
    before_the_supervisor = text.partition("# The supervisor")[0]
    # Of these Slurm sets its own in the new job
    of_the_new_job = {"SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_EXPORT_ENV", "SLURMD_NODENAME"}
    left = {**dict.fromkeys(of_the_new_job, "18"), **OF_THE_USER}
    result = run(["bash", "-c", f"{before_the_supervisor}env"], extra={**INSIDE_A_JOB, **left})
    assert result.status == 0, result.output
    received = dict(line.split("=", 1) for line in result.output.splitlines() if "=" in line)
    ranks = {name for name in INSIDE_A_JOB if not name.startswith(("SLURM_MEM", "SBATCH_"))} - of_the_new_job
    assert sorted(ranks & received.keys()) == []
    assert {name: received.get(name) for name in left} == left


def test_another_version_does_not_start(folder: Path) -> None:
    assert hvdlm_slurm(folder).status == 0
    other = folder / "other" / "hvdlm"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("__version__ = '9.9.9'\n")
    script = folder / "runs" / "mine.slurm" / "job.sh"
    result = run(["bash", str(script)], extra={"PYTHONPATH": str(other.parent), "SLURM_JOB_ID": "1"})
    assert result.status == 1
    assert result.output.startswith("hvdlm: error: hvdlm 0.")
    assert "has hvdlm 9.9.9 now: install 0." in result.output.replace("install hvdlm", "install")


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint_step(tmp_path) == 0
    tensors = {"a": torch.zeros(1)}
    for step in (7, 12):
        checkpoint.save(checkpoint.directory(tmp_path), step, tensors, tensors, {}, b"", keep=Retention(2))
    assert newest_checkpoint_step(tmp_path) == 12


# Runs a fake training, a line of bash. `until_asked` is a rank: a child that exits at SIGUSR1, which this ignores.
LAUNCHER = """#!/bin/bash
run=$1
save() { mkdir -p "$run/checkpoints"; printf 'step_%08d\\n' "$1" > "$run/checkpoints/latest"; }
until_asked() { python3 -c "$RANK" "$run/training"; }
mkdir -p "$run"
eval "$2"
"""

RANK = """
import pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
while True:
    signal.pause()
"""

SQUEUE = """#!/bin/bash
echo squeue "$@" >> "$HERE/asked"
[[ "$*" != *--states* ]] && cat "$HERE/end" && exit
grep -qx "$3" "$HERE/running" && echo "$3 RUNNING"
"""

SCONTROL = """#!/bin/bash
[[ ! -e $HERE/deny ]] || { echo "slurm_requeue error: Access denied" >&2; exit 1; }
echo "$@" >> "$HERE/requeued"
"""


class Job:
    """A job directory, and a fake Slurm whose state is in files."""

    def __init__(self, here: Path) -> None:
        self.here, self.run_dir = here, here / "run"
        (here / "config.toml").write_text(f"[train]\nsteps = {STEPS}\nrun_dir = '{self.run_dir}'\n")
        for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL), ("launcher", LAUNCHER)):
            (here / name).write_text(text)
            (here / name).chmod(0o755)
        (here / "running").touch()
        self.set_end(in_seconds=3600)

    def set_end(self, in_seconds: float) -> None:
        (self.here / "end").write_text(f"{time.time() + in_seconds:.0f}\n")

    def start(self, training: str, job: str = "17", lead: int = 300) -> LaunchedJob:
        words = [sys.executable, "-m", "hvdlm.cluster.slurm.supervise", "--job-directory", str(self.here)]
        words += ["--lead", str(lead), "--", str(self.here / "launcher"), str(self.run_dir), training]
        path = f"{self.here}:{BIN}:{os.environ['PATH']}"
        return start(words, {"HERE": str(self.here), "RANK": RANK, "SLURM_JOB_ID": job, "PATH": path})

    def run(self, training: str, job: str = "17", lead: int = 300) -> Result:
        with self.start(training, job, lead) as started:
            return started.finish(deadline=60)

    @property
    def requeued(self) -> list[str]:
        file = self.here / "requeued"
        return file.read_text().splitlines() if file.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_training_that_ends_in_time(job: Job) -> None:
    result = job.run(f"save {STEPS}")
    assert result.status == 0
    assert "start 1 of job 17, from step 0; 3" in result.output
    assert result.output.endswith("hvdlm: done: the newest checkpoint is of step 100\n")
    assert job.requeued == []


@pytest.mark.parametrize(("step", "status"), [(40, 0), (39, 1)])
def test_a_training_that_has_ended_before_its_steps(job: Job, step: int, status: int) -> None:
    """By train.max_time, say, as metrics.jsonl says of the step that is saved."""
    record = f'{{"kind": "event", "step": {step}, "message": "training ends here: ...", "ended": true}}'
    result = job.run(f"save 40; echo '{record}' >> $run/metrics.jsonl")
    assert (": done: the newest checkpoint is of step 40" in result.output) == (status == 0), result.output
    assert (job.requeued == []) == (status == 0)


def test_a_launcher_that_ends_with_status_0_too_early(job: Job) -> None:
    """As mpirun does when the daemon of another node dies."""
    result = job.run("true")
    assert result.status == 1
    assert "training failed with status 1 before it had saved anything new" in result.output
    assert job.requeued == []


def test_asked_before_the_limit(job: Job) -> None:
    job.set_end(in_seconds=5)
    result = job.run("until_asked; status=$?; save 40; exit $status", lead=3)
    assert result.status == 75
    assert result.output.endswith(
        "stopped before the limit, from step 0 to 40: back into the queue, to go on from there\n"
    )
    assert job.requeued == ["requeue 17"]


def test_after_an_early_signal_slurm_is_asked_for_the_limit(job: Job) -> None:
    with job.start("until_asked; status=$?; save 40; exit $status") as started:
        wait_for((job.run_dir / "training").exists)
        started.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: len((job.here / "asked").read_text().splitlines()) == 2)
        assert started.process.poll() is None
        job.set_end(in_seconds=60)  # as for a job that is preempted with grace
        started.process.send_signal(signal.SIGUSR1)
        result = started.finish(deadline=60)
    assert "stopped before the limit, from step 0 to 40" in result.output


def test_a_job_ends_after_two_starts_without_progress(job: Job) -> None:
    first, second = job.run("exit 75"), job.run("exit 75")
    assert first.status == second.status == 75
    assert job.requeued == ["requeue 17"]
    assert (
        "2 starts in a row have not got beyond step 0, so this job ends: its time limit is too short" in second.output
    )
    assert job.run("exit 75", job="18").status == 75  # a user may submit it again
    assert job.requeued == ["requeue 17", "requeue 18"]


def test_progress_between_two_starts_without_progress(job: Job) -> None:
    for training in ("exit 75", "save 10; exit 75", "exit 75"):
        assert "back into the queue" in job.run(training).output
    assert "have not got beyond step 10" in job.run("exit 75").output
    assert len(job.requeued) == 3


def test_failures(job: Job) -> None:
    result = job.run("echo out of memory; save 10; exit 3")
    assert result.status == 75
    assert "failed with status 3, from step 0 to 10: back into the queue" in result.output
    result = job.run("exit 3")
    assert result.status == 3
    assert "failed with status 3 before it had saved anything new" in result.output
    assert "the newest checkpoint is of step 10" in result.output
    assert job.requeued == ["requeue 17"]


def test_cancelled(job: Job) -> None:
    with job.start("until_asked; status=$?; save 40; exit $status") as started:
        wait_for((job.run_dir / "training").exists)
        started.process.send_signal(signal.SIGTERM)
        result = started.finish(deadline=60)
    assert result.status == 75
    assert "stopped by SIGTERM (scancel or preemption): the newest checkpoint is of step 40" in result.output
    assert f"go on with `sbatch {job.here}/job.sh`" in result.output
    assert job.requeued == []


def test_saving_takes_longer_than_the_lead(job: Job) -> None:
    job.set_end(in_seconds=5)
    saving = 'until_asked; while [[ ! -e "$run/go" ]]; do sleep 0.05; done; save 40; exit 75'
    with job.start(saving, lead=3) as started:
        wait_for(lambda: job.requeued == ["requeue 17"])
        started.process.send_signal(signal.SIGTERM)  # as Slurm does then
        (job.run_dir / "go").touch()
        result = started.finish(deadline=60)
    assert result.status == 75
    assert "training has not ended 3 s after it was asked to: saving takes longer than that" in result.output
    assert result.output.endswith(
        "training has ended; the newest checkpoint is of step 40; the job is back in the queue\n"
    )
    job.set_end(in_seconds=3600)
    assert "start 2 of job 17, from step 40" in job.run("exit 75").output
    assert len(job.requeued) == 2  # the start before it made progress


def test_node_failures_end_a_job_after_five_starts(job: Job) -> None:
    for _ in range(5):
        StartLog(job.here / "starts.jsonl").begin("17", 0)
    with (job.here / "starts.jsonl").open("a") as file:
        file.write('\n{"job": "17", "st')
    result = job.run(f"save {STEPS}")
    assert result.status == 1
    assert "the last 5 starts of job 17 ended without a new checkpoint, 5 of them cut short" in result.output
    assert not job.run_dir.exists()


def test_after_a_node_failure(job: Job) -> None:
    StartLog(job.here / "starts.jsonl").begin("17", 0)
    result = job.run("exit 75")
    assert "the start before this one was cut short: its node failed, or Slurm preempted the job" in result.output
    assert job.requeued == ["requeue 17"]


def test_two_jobs_do_not_train_the_same_run(job: Job) -> None:
    StartLog(job.here / "starts.jsonl").begin("16", 0)
    (job.here / "running").write_text("16\n")
    result = job.run(f"save {STEPS}")
    assert result.status == 1
    assert f"Slurm job 16 is training {job.run_dir} right now" in result.output
    (job.here / "running").write_text("")
    assert job.run(f"save {STEPS}").status == 0


def test_a_requeue_that_slurm_refuses(job: Job) -> None:
    (job.here / "deny").touch()
    result = job.run("save 10; exit 75")
    assert result.status == 75
    assert "`scontrol requeue 17` failed: slurm_requeue error: Access denied; go on with `sbatch" in result.output


def test_a_launcher_that_is_not_there(job: Job) -> None:
    (job.here / "launcher").unlink()
    result = job.run("")
    assert result.status == 1
    assert result.output.endswith(f"hvdlm: error: cannot start {job.here}/launcher: No such file or directory\n")
