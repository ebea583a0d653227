"""Checkpoints that are written while training goes on: what is kept, when, and what becomes of a disk that is full."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import flip_bit, small_disk
from jobs import (
    Ranks,
    assert_bit_identical,
    command,
    losses,
    records,
    start_training,
    train_on_shared_and_own_disks,
    wait_for,
)
from launcher import BIN, launcher_command, run
from safetensors.torch import load_file

SAVING = {"checkpoint__every": 10, "log__every": 10}


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def events(run_dir: Path) -> list[str]:
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [str(record["message"]) for record in records(run_dir, "event")]


def made(run_dir: Path) -> list[int]:
    """The steps of which a checkpoint was written, in that order."""
    return [int(event.rpartition("_")[2]) for event in events(run_dir) if event.startswith("saved ")]


@pytest.fixture(name="small_disk")
def make_small_disk(tmp_path: Path) -> Iterator[Path]:
    """600 KiB: room for one checkpoint of the test's model and a part of the next."""
    with small_disk(tmp_path / "disk", "600k"):
        yield tmp_path / "disk"


@pytest.mark.needs_root
def test_a_disk_that_stays_full(ranks: Ranks, small_disk: Path, small_data: Path, tmp_path: Path) -> None:
    """The first checkpoint is whole, the next three fail, of which the third ends the job; then it is resumed."""
    run_dir = small_disk / "run"
    result = ranks.train(2, small_data, run_dir, **SAVING)
    assert result.status == 1, result.output
    for step, left in ((20, 2), (30, 1)):
        assert f"step {step} was not saved: cannot write the checkpoint" in result.output
        assert f"No space left on device; make room; {left} more may fail (checkpoint.max_failures)" in result.output
    (error,) = [line for line in result.output.splitlines() if "error:" in line]
    assert "step_00000040: No space left on device; make room, or choose another train.run_dir" in error
    assert steps(run_dir) == made(run_dir) == [10]
    resumed = ranks.train(2, small_data, tmp_path / "run", "--resume", str(run_dir), **SAVING)
    assert resumed.status == 0, resumed.output
    assert "step_00000010, step 10" in resumed.output
    assert max(losses(tmp_path / "run")) == 50


@pytest.mark.thorough
@pytest.mark.needs_root
def test_a_disk_that_is_full_for_a_while(small_disk: Path, small_data: Path, tmp_path: Path) -> None:
    """Training goes on, saves again when there is room, and ends with what it would have ended with."""
    subprocess.run(["mount", "-o", "remount,size=1200k", str(small_disk)], check=True)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1000 << 10))
    broken, whole = small_disk / "run", tmp_path / "whole"
    saving = {**SAVING, "checkpoint__keep": 1, "checkpoint__max_failures": 4}
    with start_training("mpirun", 2, small_data, broken, **saving) as job:
        wait_for(lambda: "step 20 was not saved" in "".join(events(broken)), job)
        filler.unlink()
        result = job.finish(deadline=120)
    assert result.status == 0, result.output
    assert made(broken)[-1] == 50
    assert steps(broken) == [50]
    with start_training("mpirun", 2, small_data, whole, **saving) as job:
        assert job.finish(deadline=120).status == 0
    assert_bit_identical(whole, broken)


@pytest.mark.needs_root
def test_a_last_checkpoint_that_cannot_be_written(ranks: Ranks, small_disk: Path, small_data: Path) -> None:
    """It ends the job with an error, however many may fail."""
    result = ranks.train(2, small_data, small_disk / "run", checkpoint__every=40, checkpoint__max_failures=9)
    assert result.status == 1
    assert "step_00000050: No space left on device" in result.output
    assert "resume from the checkpoint before it" in result.output
    assert steps(small_disk / "run") == [40]


@pytest.mark.thorough
def test_those_of_a_multiple_and_the_best_are_kept(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """A learning rate that is too high makes the loss rise after it has fallen."""
    run_dir = tmp_path / "run"
    keeping = {"checkpoint__keep": 1, "checkpoint__keep_every": 20, "checkpoint__keep_best": "true"}
    options = {"train__evaluate_every": 5, "train__evaluate_sequences": 0, "optimizer__lr": 2.0}
    result = ranks.train(2, small_data, run_dir, optimizer__warmup_steps=45, **keeping, **options)
    assert result.status == 0, result.output
    validated = {int(str(each["step"])): float(str(each["loss"])) for each in records(run_dir, "eval")}
    assert made(run_dir) == sorted(validated) == list(range(5, 51, 5))  # each validation is preceded by a checkpoint
    best = min(validated, key=lambda step: validated[step])
    assert best not in (20, 40, 50), "this test would show nothing"
    assert steps(run_dir) == sorted({20, 40, 50, best})
    link = run_dir / "checkpoints" / "best"
    assert link.resolve().name == f"step_{best:08d}"
    said = run([str(BIN / "hvdlm"), "evaluate", str(link), "--data", str(small_data)])
    assert said.status == 0, said.output
    assert f"{validated[best]:.4f}" in said.output


def test_by_time(small_data: Path, tmp_path: Path) -> None:
    """Rank 0's clock decides for all, between steps that no number names."""
    run_dir = tmp_path / "run"
    saving = {"checkpoint__every": "1s", "checkpoint__keep": 99, "train__steps": 2000, "log__every": 500}
    with start_training("mpirun", 2, small_data, run_dir, **saving) as job:
        wait_for(lambda: len(made(run_dir)) > 2, job)
        job.ranks()[0].terminate()
        assert job.finish(deadline=120).status == 75
    assert steps(run_dir) == made(run_dir)


@pytest.mark.thorough
def test_hosts_that_do_not_share_the_directory(small_data: Path, tmp_path: Path) -> None:
    """Rank 0 receives and writes what the others have of their own: the files are those of ranks that share it."""
    options = {**SAVING, "compression__codec": "int4", "train__threads": 1}
    shared, apart = train_on_shared_and_own_disks(small_data, tmp_path, **options)
    for step in (30, 50):
        for rank in range(3):
            file = Path("run") / "checkpoints" / f"step_{step:08d}" / "ranks" / f"rank_{rank:05d}.safetensors"
            one, other = load_file(shared.parent / file), load_file(apart / "0" / file)
            assert one.keys() == other.keys() != set()
            assert all(one[name].equal(other[name]) for name in one)


def test_a_rank_that_cannot_write_its_own_file(small_data: Path, tmp_path: Path) -> None:
    """The checkpoint fails as a whole, the one before it stays, training goes on."""
    run_dir = tmp_path / "run"
    body = tmp_path / "body.py"
    body.write_text(
        "import os, sys\n"
        "import safetensors.torch\n"
        "real = safetensors.torch.save_file\n"
        "def save_file(tensors, file, *rest):\n"
        "    if 'rank_00001' in str(file) and os.environ['FAILS'] in str(os.listdir(file.parent.parent)):\n"
        "        raise OSError(122, 'Disk quota exceeded')\n"
        "    return real(tensors, file, *rest)\n"
        "safetensors.torch.save_file = save_file\n"
        "from hvdlm.cli import main\n"
        "sys.exit(main())\n"
    )
    words = command(small_data, run_dir, **SAVING, compression__codec="int4")[1:]
    script = ["env", "FAILS=step_00000020", sys.executable, str(body), *words]
    result = run([*launcher_command("mpirun", 2), *script])
    assert result.status == 1, result.output
    assert made(run_dir) == steps(run_dir) == [10, 20]
    assert "step 30 was not saved: rank 1: cannot write" in result.output
    assert "Disk quota exceeded" in result.output


@pytest.fixture
def three(ranks: Ranks, small_data: Path, tmp_path: Path) -> Path:
    """A run with three checkpoints, of two ranks that have residuals."""
    options = {"checkpoint__every": 20, "compression__codec": "int4"}
    assert ranks.train(2, small_data, tmp_path / "run", **options).status == 0
    return tmp_path / "run"


def mix(checkpoint: Path) -> None:
    """The model of one step in the checkpoint of another, manifest and all, as a copy that was broken off leaves it."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    other = checkpoint.with_name("step_00000020")
    theirs = json.loads((other / "manifest.json").read_text())
    (checkpoint / "state.json").write_bytes((other / "state.json").read_bytes())
    manifest["files"]["state.json"] = theirs["files"]["state.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: flip_bit(path / "model.safetensors"), "model.safetensors does not match its SHA-256"),
    "flipped, of a rank": (
        lambda path: flip_bit(path / "ranks" / "rank_00001.safetensors"),
        "rank_00001.safetensors does",
    ),
    "truncated": (lambda path: (path / "optimizer.safetensors").write_bytes(b"short"), "has 5 bytes instead of"),
    "torn": (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
    "mixed": (mix, "is mixed of several: its manifest says 40, state.json says 20, its name says 40"),
    "of another name": (lambda path: path.rename(path.with_name("step_00000045")), "its name says 45"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_what_is_damaged(three: Path, damage: str) -> None:
    apply, sentence = DAMAGE[damage]
    verify = [str(BIN / "hvdlm"), "verify", str(three)]
    good = run(verify)
    assert good.status == 0, good.output
    assert good.output.count(": whole, ") == 3
    apply(three / "checkpoints" / "step_00000040")
    result = run(verify)
    assert result.status == 1
    assert result.output.count(": whole, ") == 2
    assert sentence in result.output
