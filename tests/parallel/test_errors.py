"""What goes wrong is said once, in a sentence that names it, and no rank is left behind (launcher.py sees to that)."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from jobs import Ranks, command, records, start_training
from launcher import Result, launcher_command, run
from pool import Pools
from thorough import thorough

from hvdlm.comm.connect import connect
from hvdlm.errors import HvdlmError

SABOTAGE = Path(__file__).with_name("sabotage.py")


def assert_said_once(result: Result, *parts: str) -> None:
    """One line of the output is the error; it contains all parts; nothing else complains, and no traceback shows."""
    assert result.status != 0, result.output
    said = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    assert len(said) == 1, result.output
    assert all(part in said[0] for part in parts), said[0]
    assert "Traceback" not in result.output, result.output


def sabotaged(kind: str, rank: int, data: Path, run_dir: Path, **overrides: object) -> Result:
    words = command(data, run_dir, **overrides)[1:]
    return run([*launcher_command("mpirun", 2), sys.executable, str(SABOTAGE), kind, str(rank), *words])


@pytest.fixture
def own_data(small_data: Path, tmp_path: Path) -> Path:
    """A copy of the data set that the test may damage."""
    return Path(shutil.copytree(small_data, tmp_path / "data"))


def chunk_of_middle(file: Path) -> tuple[int, int]:
    """Where in the file the middle chunk of /tokens lies: offset and size in bytes."""
    with h5py.File(file) as shard:
        info = shard["tokens"].id.get_chunk_info(shard["tokens"].id.get_num_chunks() // 2)
        return info.byte_offset, info.size


def test_flipped_byte_in_a_shard(own_data: Path, tmp_path: Path) -> None:
    """Found in mid-run by the rank that reads it, told to all before anybody waits for its gradients.

    Every rank of a launched job says nothing more and exits; the other tests of what all ranks find out together use
    ranks of the pool.
    """
    file = own_data / "shard_00005.h5"
    offset, size = chunk_of_middle(file)
    content = bytearray(file.read_bytes())
    content[offset + size // 2] ^= 0xFF
    file.write_bytes(content)
    with start_training("mpirun", 2, own_data, tmp_path / "run", train__steps=2000) as job:
        assert_said_once(job.finish(deadline=120), "shard_00005.h5", "chunk", "rank 1")


def test_truncated_shard(ranks: Ranks, own_data: Path, tmp_path: Path) -> None:
    file = own_data / "shard_00002.h5"
    os.truncate(file, file.stat().st_size - 1000)
    assert_said_once(ranks.train(2, own_data, tmp_path / "run"), "shard_00002.h5")


def test_missing_shard(ranks: Ranks, own_data: Path, tmp_path: Path) -> None:
    (own_data / "shard_00003.h5").unlink()
    assert_said_once(ranks.train(3, own_data, tmp_path / "run"), "shard_00003.h5")


def test_swapped_shards(ranks: Ranks, own_data: Path, tmp_path: Path) -> None:
    one, other = own_data / "shard_00000.h5", own_data / "shard_00001.h5"
    one.rename(own_data / "aside")
    other.rename(one)
    (own_data / "aside").rename(other)
    assert_said_once(ranks.train(2, own_data, tmp_path / "run"), "shard_0000")


def test_unfinished_shard(ranks: Ranks, own_data: Path, tmp_path: Path) -> None:
    with h5py.File(own_data / "shard_00005.h5", "r+") as shard:
        shard.attrs["complete"] = False
    assert_said_once(ranks.train(2, own_data, tmp_path / "run"), "shard_00005.h5")


def test_data_set_that_is_not_there(ranks: Ranks, tmp_path: Path) -> None:
    result = ranks.train(2, tmp_path / "nowhere", tmp_path / "run")
    assert_said_once(result, str(tmp_path / "nowhere"), "hvdlm prepare")


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun --gloo"])
def test_settings_that_no_rank_can_read(launcher: str, tmp_path: Path) -> None:
    words = [str(Path(sys.executable).with_name("hvdlm")), "train", str(tmp_path / "none.toml")]
    assert_said_once(run([*launcher_command(launcher, 3), *words]), "cannot read the configuration", "none.toml")


def test_different_settings(small_data: Path, tmp_path: Path) -> None:
    one = command(small_data, tmp_path / "run")
    other = command(small_data, tmp_path / "run", train__seed=5)
    result = run([*launcher_command("mpirun", 1), *one, ":", "-np", "1", *other])
    assert_said_once(result, "ranks differ in settings: rank 0 on", "rank 1 on")


def test_different_versions(small_data: Path, tmp_path: Path) -> None:
    result = sabotaged("other_version", 1, small_data, tmp_path / "run")
    assert_said_once(result, "ranks differ in hvdlm: rank 0 on", "rank 1 on", "has 0.0.1")


def test_replicas_that_drift_apart(small_data: Path, tmp_path: Path) -> None:
    """One parameter of one rank off by a millionth: found at the next comparison."""
    result = sabotaged("diverging_parameter", 1, small_data, tmp_path / "run", train__check_replicas_every=5)
    assert_said_once(result, "after step 15 the parameters of rank 1 on", "differ")


@pytest.mark.parametrize(("ranks", "odd", "good"), [(3, 0, 1), thorough(2, 1, 0)])
def test_a_flipped_bit_is_healed(ranks: int, odd: int, good: int, small_data: Path, tmp_path: Path) -> None:
    """Of three ranks from the two that agree, of two from rank 0; all go on with equal parameters and moments."""
    words = command(small_data, tmp_path / "run", train__check_replicas_every=5, train__heal_replicas="true")[1:]
    result = run([*launcher_command("mpirun", ranks), sys.executable, str(SABOTAGE), "flipped_bit", str(odd), *words])
    assert result.status == 0, result.output
    healed = re.findall(
        r"after step (\d+) the parameters of rank (\d) on .*: it has those of rank (\d) now", result.output
    )
    assert healed == [("15", str(odd), str(good))], result.output


# Goes on as another program whose stderr is a pipe that is full
FILL_STDERR = """
import os, sys
reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while os.write(writer, bytes(4096)):
        pass
except BlockingIOError:
    os.set_blocking(writer, True)
os.dup2(writer, 2)
os.set_inheritable(reader, True)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("stderr", ["read", thorough("not read")])
def test_a_rank_that_is_stuck(stderr: str, small_data: Path, tmp_path: Path) -> None:
    """It says what it does and for how long, with every thread's stack, and ends the job, even if nobody reads that."""
    words = command(small_data, tmp_path / "run", comm__timeout=5)[1:]
    sabotaged = [sys.executable, str(SABOTAGE), "stuck", "1", *words]
    if stderr == "not read":
        sabotaged = [sys.executable, "-c", FILL_STDERR, *sabotaged]
    result = run([*launcher_command("mpirun", 2), *sabotaged], deadline=90)
    assert result.status not in (0, 75), result.output
    if stderr == "read":
        assert re.search(r"rank 1 on \S+ is stuck: it computes micro-batch 1 of step 13, for 5 s", result.output)
        assert "in endless_forward" in result.output
        assert "hvdlm-watchdog" in result.output or "_watch" in result.output


@pytest.mark.thorough
def test_a_file_system_that_is_stuck(small_data: Path, tmp_path: Path) -> None:
    """Ten times comm.timeout is what a checkpoint may take."""
    result = sabotaged("stuck_file_system", 0, small_data, tmp_path / "run", checkpoint__every=10, comm__timeout=3)
    assert result.status not in (0, 75), result.output
    assert re.search(r"is stuck: it waits for files, for 30 s \(comm.timeout\)", result.output)


def test_a_straggler_is_named(small_data: Path, tmp_path: Path) -> None:
    words = command(small_data, tmp_path / "run", log__every=5)[1:]
    result = run([*launcher_command("mpirun", 2), sys.executable, str(SABOTAGE), "slow", "1", *words])
    assert result.status == 0, result.output
    said = re.findall(r"step (\d+)/50  rank (\d) on \S+ is a straggler: it computes [\d.]+ times", result.output)
    assert said == [("15", "1")], result.output


def test_bug_on_one_rank_ends_all(small_data: Path, tmp_path: Path) -> None:
    result = sabotaged("bug", 1, small_data, tmp_path / "run")
    assert result.status != 0
    assert "rank 1 met a bug in hvdlm" in result.output
    assert "ZeroDivisionError: a bug for the test" in result.output


@pytest.fixture(scope="module")
def mpich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mpiexec of another MPI than the one that mpi4py has loaded."""
    prefix = tmp_path_factory.mktemp("mpich")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--prefix", str(prefix), "mpich"]
    subprocess.run(install, check=True)
    return prefix / "bin" / "mpiexec"


def test_all_ranks_believe_they_are_rank_0(mpich: Path, small_data: Path, tmp_path: Path) -> None:
    """mpiexec of one MPI, mpi4py of another: the trap behind horovod issue 1756."""
    words = command(small_data, tmp_path / "run", comm__engine="mpi")
    result = run([str(mpich), "-n", "2", *words], extra={"LD_LIBRARY_PATH": ""})
    assert result.status != 0
    said = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    assert said, result.output
    assert "mpirun started 2 ranks and this is rank" in said[0]
    assert "engine mpi sees 1" in said[0] and "Open MPI" in said[0]
    assert not (tmp_path / "run").exists()


def test_engine_that_does_not_fit_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(HvdlmError, match=r"mpirun started 2 ranks and this is rank 1 .* leave comm.engine at auto"):
        connect("solo", timeout=10)


@pytest.fixture(scope="module")
def short_run(pools: Pools, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a training of five steps."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    result = Ranks(pools.get("mpi", "mpirun", 4)).train(1, small_data, run_dir, train__steps=5)
    assert result.status == 0, result.output
    return run_dir


def test_run_directory_in_use(ranks: Ranks, small_data: Path, short_run: Path) -> None:
    before = (short_run / "metrics.jsonl").read_bytes()
    assert_said_once(ranks.train(2, small_data, short_run), "already holds a run", "--resume latest")
    assert (short_run / "metrics.jsonl").read_bytes() == before


def test_run_directory_that_cannot_be_made(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_said_once(ranks.train(2, small_data, tmp_path / "file"), "train.run_dir", "file: File exists")


def test_resuming_another_model(ranks: Ranks, small_data: Path, short_run: Path) -> None:
    result = ranks.train(2, small_data, short_run, "--resume", "latest", model__width=64)
    assert_said_once(result, "model.width = 32, not 64")


def test_resuming_what_is_not_there(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", str(tmp_path / "nowhere"))
    assert_said_once(result, str(tmp_path / "nowhere"), "no checkpoint")


def test_vocabulary_too_small(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.train(2, small_data, tmp_path / "run", model__vocab_size=100)
    assert_said_once(result, "model.vocab_size = 100 is less than the 257")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"train__precision": "fp16"}, "with the least loss scale, 1 at step 28, the last of 11 in a row (batch 27)"),
        ({"train__precision": "fp16", "train__steps": 2}, "the validation loss is"),
        ({"train__precision": "fp32", "train__steps": 1}, "the validation loss is"),
    ],
)
def test_a_run_that_diverges_in_its_first_step(
    settings: dict[str, object], part: str, ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    """Weights become 1e30, which is finite. It takes 17 overflows from loss scale 65,536 to 1 and beyond."""
    settings |= {"optimizer__lr": 1e30, "optimizer__warmup_steps": 0}
    assert_said_once(ranks.train(2, small_data, tmp_path / "run", **settings), part, "optimizer.lr")


def test_weights_that_are_not_finite_are_not_saved(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """A rate that overflows fp32 itself makes them infinite in the one step that there is."""
    settings = {"optimizer__lr": 1e39, "optimizer__warmup_steps": 0, "train__steps": 1}
    result = ranks.train(2, small_data, tmp_path / "run", **settings)
    assert_said_once(result, "holds NaN or infinite numbers after step 1, which is not saved", "optimizer.lr")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_loss_scale_helps(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Every step overflows: 16 halvings bring the loss scale from 65,536 to 1."""
    steps = range(1, 31)
    result = ranks.train(
        2,
        small_data,
        tmp_path / "run",
        overflow_at=steps,
        train__steps=30,
        train__precision="fp16",
        train__max_skipped=2,
    )
    assert_said_once(
        result,
        "the gradient of final_norm.weight overflows in fp16 even with the least loss scale, 1 at step 19, the last "
        "of 3 in a row (batch 18): set train.precision to bf16",
    )


def test_divergence(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.train(2, small_data, tmp_path / "run", optimizer__lr=1e30, optimizer__warmup_steps=0)
    assert_said_once(result, "is not finite at step 12, the last of 11 in a row", "lower optimizer.lr")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_gradients_that_are_not_finite(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """One rank's alone: all leave out the step alike, two in a row too; the third in a row ends the job."""
    options = {"train__steps": 12, "train__max_skipped": 2, "train__check_replicas_every": 1}
    result = ranks.train(2, small_data, tmp_path / "run", overflow_at=(3, 6, 7), **options)
    assert result.status == 0, result.output
    for step in (3, 6, 7):
        said = f"step {step} is left out: the gradient of final_norm.weight is not finite (batch {step - 1})"
        assert result.output.count(said) == 1, result.output
    norms = {record["step"]: record["grad_norm"] for record in records(tmp_path / "run")}
    assert [step for step in norms if norms[step] is None] == [3, 6, 7]
    result = ranks.train(2, small_data, tmp_path / "other", overflow_at=(3, 6, 7, 8), **options)
    assert_said_once(
        result, "the gradient of final_norm.weight is not finite at step 8, the last of 3 in a row (batch 7): lower"
    )


def test_gradients_of_local_steps_that_are_not_finite(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The rank that has them leaves out its own step, and tells the others at the end of a round that it gives up."""
    options = {"train__steps": 20, "train__max_skipped": 1, "local_steps__every": 4}
    result = ranks.train(2, small_data, tmp_path / "run", overflow_at=(6, 8), **options)
    assert result.status == 0, result.output
    for step in (6, 8):
        assert result.output.count(f"rank 1: step {step} is left out: the gradient of final_norm.weight") == 1
    result = ranks.train(2, small_data, tmp_path / "other", overflow_at=(6, 7), **options)
    assert_said_once(result, "rank 1 on", "final_norm.weight is not finite at step 7, the last of 2 in a row (batch 6)")


@pytest.mark.parametrize(
    ("engine", "launcher", "algorithm"),
    [
        ("mpi", "mpirun", "ring"),
        thorough("mpi", "mpirun", "engine"),
        thorough("torch", "mpirun", "ring"),
        thorough("horovod", "mpirun", "auto"),
        ("horovod", "horovodrun --gloo", "auto"),
    ],
)
def test_rank_that_stopped(engine: str, launcher: str, algorithm: str, small_data: Path, tmp_path: Path) -> None:
    """The others wait comm.timeout for it, each says for whom and with what, and the stopped rank ends too."""
    settings = {"comm__engine": engine, "comm__timeout": 5, "comm__algorithm": algorithm}
    words = command(small_data, tmp_path / "run", train__micro_batch_size=16, **settings)[1:]
    result = run([*launcher_command(launcher, 3), sys.executable, str(SABOTAGE), "stopped", "1", *words])
    assert result.status != 0
    for rank in (0, 2):
        said = re.search(f"hvdlm: error: gradient bucket 1 of 1: rank {rank} .*", result.output)
        assert said, result.output
        assert f"; rank 1 on {socket.gethostname()} does not answer" in said[0]
    assert "Traceback" not in result.output or launcher.startswith("horovodrun"), result.output  # horovodrun's own


@pytest.mark.parametrize(("count", "started"), [(1, "1 process was started"), (2, "2 ranks were started, on 1 node")])
def test_fewer_ranks_than_were_asked_for(
    count: int, started: str, ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    result = ranks.train(count, small_data, tmp_path / "run", train__ranks=3)
    assert_said_once(result, f"train.ranks = 3, but {started}: name as many to the launcher")
    assert not (tmp_path / "run").exists()
    assert ranks.train(count, small_data, tmp_path / "run", train__ranks=count, train__steps=5).status == 0


def test_data_set_too_small(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """And the corrected command finds the run directory free."""
    result = ranks.train(2, small_data, tmp_path / "run", model__context_length=500_000)
    assert_said_once(result, "context_length")
    assert ranks.train(2, small_data, tmp_path / "run", train__steps=5).status == 0


def test_horovod_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the command that installs it."""
    monkeypatch.setitem(sys.modules, "horovod", None)
    with pytest.raises(HvdlmError, match="hvdlm install-horovod"):
        connect("horovod", timeout=10)
