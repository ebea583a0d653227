"""A run that was stopped, by a signal, a kill or a damaged disk, and resumed is the run that was not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import h5py
import pytest
from jobs import Ranks, assert_bit_identical, assert_same_curve, losses, records, start_training
from launcher import Job
from safetensors.torch import load_file
from thorough import thorough

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.sampler import Sampler
from hvdlm.data.shard import DataSet

SAVING = {"checkpoint__every": 7, "model__dropout": 0.1}


def wait_for_step(job: Job, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or max(losses(run_dir), default=0) < step:
        assert job.process.poll() is None and time.monotonic() < deadline, "the job ended or never reached the step"
        time.sleep(0.02)


def uninterrupted(
    ranks: Ranks, size: int, data: Path, folder: Path, overflow_at: Sequence[int] = (), **settings: object
) -> Path:
    result = ranks.train(size, data, folder / "whole", overflow_at=overflow_at, **{**SAVING, **settings})
    assert result.status == 0, result.output
    return folder / "whole"


def as_if_killed(whole: Path, broken: Path, step: int) -> None:
    """A copy of a run as a kill leaves it: metrics up to `step`, and the checkpoints until then."""
    shutil.copytree(whole, broken)
    kept = [line for line in (whole / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step]
    (broken / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    checkpoints = sorted((broken / "checkpoints").glob("step_*"))
    for checkpoint in checkpoints:
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (latest,) = (each for each in checkpoints if each.exists() and each.name == f"step_{step // 7 * 7:08d}")
    (broken / "checkpoints" / "latest").write_text(f"{latest.name}\n")


@pytest.mark.parametrize("size", [thorough(1), 2])
def test_killed_and_resumed(size: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """kill -9 of one rank; the launcher ends the rest; steps after the checkpoint are run again, with dropout."""
    whole = uninterrupted(ranks, size, small_data, tmp_path)
    broken = tmp_path / "broken"
    with start_training("mpirun", size, small_data, broken, **SAVING) as job:
        wait_for_step(job, broken, 17)
        job.ranks()[-1].kill()
        assert job.finish(deadline=120).status != 0
    result = ranks.train(size, small_data, broken, "--resume", "latest", **SAVING)
    assert result.status == 0, result.output
    assert "resuming from" in result.output
    assert_bit_identical(whole, broken)


@pytest.mark.parametrize("number", [signal.SIGTERM, thorough(signal.SIGINT), thorough(signal.SIGHUP)])
@pytest.mark.parametrize(("launcher", "which"), [thorough("mpirun", 0), ("mpirun", 1), ("horovodrun --gloo", 1)])
def test_signal_to_any_rank(
    number: signal.Signals, launcher: str, which: int, small_data: Path, tmp_path: Path
) -> None:
    """All ranks finish the step, save and exit with 75, and the run goes on as if nothing had been."""
    run_dir = tmp_path / "run"
    settings = {**SAVING, "train__steps": 100_000}
    with start_training(launcher, 2, small_data, run_dir, **settings) as job:
        wait_for_step(job, run_dir, 10)
        job.ranks()[which].send_signal(number)
        result = job.finish(deadline=120)
    assert result.status == 75 if launcher == "mpirun" else "Exit code: 75" in result.output, result.output
    stopped_at = max(losses(run_dir))
    assert f"stopped after step {stopped_at}; go on with --resume latest" in result.output
    assert (run_dir / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").exists()


def test_stopped_by_a_signal_and_resumed(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    whole = uninterrupted(ranks, 2, small_data, tmp_path)
    stopped = tmp_path / "stopped"
    assert ranks.train(2, small_data, stopped, stop_after=4, **SAVING).status == 75
    assert 4 <= max(losses(stopped)) <= 5  # the step in hand, or the next one if the signal came after its agreement
    result = ranks.train(2, small_data, stopped, "--resume", "latest", **SAVING)
    assert result.status == 0, result.output
    assert_bit_identical(whole, stopped)


@pytest.mark.parametrize("precision", ["fp32", thorough("fp16")])
@pytest.mark.parametrize("codec", [thorough("fp16"), "int4", thorough("topk"), "powersgd"])
def test_residuals_are_resumed_exactly(
    codec: str, precision: str, ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    """On as many ranks bit for bit; on more, as near as it can be when the residuals are shared out anew.

    In fp16 two steps overflow on one rank, one before the checkpoint and one after it.
    """
    overflow_at = (10, 20) if precision == "fp16" else ()
    settings = {
        "checkpoint__every": 7, "checkpoint__keep": 9, "model__width": 64, "optimizer__lr": 0.002,
        "compression__codec": codec, "train__precision": precision, "model__dropout": 0.0,
    }  # fmt: skip
    whole = uninterrupted(ranks, 2, small_data, tmp_path, overflow_at, **settings)
    broken, moved = tmp_path / "broken", tmp_path / "moved"
    as_if_killed(whole, broken, 17)
    as_if_killed(whole, moved, 17)
    files = [broken / "checkpoints" / "step_00000014" / "ranks" / f"rank_0000{rank}.safetensors" for rank in (0, 1)]
    first, second = (load_file(file) for file in files)
    assert any(first[name].any() and not first[name].equal(second[name]) for name in first)
    result = ranks.train(2, small_data, broken, "--resume", "latest", overflow_at=overflow_at, **settings)
    assert result.status == 0, result.output
    assert "step_00000014, step 14" in result.output
    assert_bit_identical(whole, broken)
    for step in overflow_at:
        assert any(event["step"] == step - 1 and "overflowed" in event["message"] for event in records(broken, "event"))
    result = ranks.train(3, small_data, moved, "--resume", "latest", overflow_at=overflow_at, **settings)
    assert result.status == 0, result.output
    assert_same_curve(losses(moved), losses(whole), relative=1e-3 if (codec, precision) == ("fp16", "fp32") else 0.05)


def test_resumed_on_other_numbers_of_ranks(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """3 ranks, then 1, then 4: the curve of 2 that never stopped."""
    settings = {"checkpoint__every": 10}
    whole = ranks.train(2, small_data, tmp_path / "whole", **settings)
    assert whole.status == 0, whole.output
    run_dir = tmp_path / "moved"
    # a part of a run must keep the whole run's schedule, so it is a signal that ends it
    for size, stop_after in ((3, 20), (1, 30), (4, None)):
        result = ranks.train(size, small_data, run_dir, "--resume", "latest", stop_after=stop_after, **settings)
        assert result.status == (75 if stop_after else 0), result.output
    assert {record["world_size"] for record in records(run_dir)} == {3, 1, 4}
    assert_same_curve(losses(run_dir), losses(tmp_path / "whole"), relative=1e-4)


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    run_dir = uninterrupted(ranks, 2, small_data, tmp_path)
    expected = losses(run_dir)
    newest = run_dir / "checkpoints" / "step_00000050" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    result = ranks.train(2, small_data, run_dir, "--resume", "latest", **SAVING)
    assert result.status == 0, result.output
    assert f"{newest.parent} is damaged: model.safetensors does not match its SHA-256" in result.output
    assert "step_00000049, step 49" in result.output
    assert losses(run_dir) == expected
    explicit = tmp_path / "explicit"
    newest.write_bytes(content)
    result = ranks.train(2, small_data, explicit, "--resume", str(newest.parent), **SAVING)
    assert result.status != 0
    assert result.output.count("is damaged: model.safetensors") == 1
    assert not explicit.exists()
    before = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    newest.write_bytes(bytes(content[:-5]) + bytes([content[-5] ^ 1]) + bytes(content[-4:]))
    result = ranks.train(2, small_data, run_dir, "--resume", "latest", **SAVING)
    assert result.status == 0, result.output
    assert "all 50 steps are done: nothing to train" in result.output
    assert (run_dir / "metrics.jsonl").read_text(encoding="utf-8") == before  # a finished run is not changed


# ---- what is done is saved before anything else may fail

# A validation of some seconds, so that there is time to end it
LONG_VALIDATION = {"train__evaluate_sequences": 0, "train__micro_batch_size": 1, "train__steps": 3}
LONG_VALIDATION |= {"optimizer__warmup_steps": 0}


def wait_for_validation(job: Job, run_dir: Path) -> None:
    """Until the last step is saved, after which a validation begins."""
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "latest").exists():
        assert job.process.poll() is None and time.monotonic() < deadline, "the job ended or saved nothing"
        time.sleep(0.01)


def test_killed_in_the_last_validation(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Nothing that was trained is lost, and the validation is made up for."""
    run_dir = tmp_path / "run"
    with start_training("none", 1, small_data, run_dir, **LONG_VALIDATION) as job:
        wait_for_validation(job, run_dir)
        job.process.kill()
        job.finish(deadline=60)
    assert not records(run_dir, "eval")
    settings = {**LONG_VALIDATION, "train__evaluate_sequences": 8}
    result = ranks.train(2, small_data, run_dir, "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert [record["step"] for record in records(run_dir, "eval")] == [3]
    assert sorted(losses(run_dir)) == [1, 2, 3]


def test_asked_to_stop_in_a_validation(small_data: Path, tmp_path: Path) -> None:
    """It is broken off; on the way there all ranks have saved the step before it."""
    run_dir = tmp_path / "run"
    with start_training("mpirun", 2, small_data, run_dir, **LONG_VALIDATION) as job:
        wait_for_validation(job, run_dir)
        job.ranks()[1].send_signal(signal.SIGUSR1)
        result = job.finish(deadline=60)
    assert result.status == 75, result.output
    assert not records(run_dir, "eval")
    assert (run_dir / "checkpoints" / "step_00000003" / "manifest.json").exists()


def test_data_that_moves_while_a_job_runs(small_data: Path, tmp_path: Path) -> None:
    """What has been trained is saved, and the sentence names what cannot be read: here the validation split."""
    data, run_dir = Path(shutil.copytree(small_data, tmp_path / "data")), tmp_path / "run"
    with start_training("none", 1, data, run_dir, train__steps=200) as job:
        wait_for_step(job, run_dir, 20)
        data.rename(tmp_path / "moved")
        result = job.finish(deadline=60)
    assert result.status == 1, result.output
    (said,) = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    assert f"{data}/val/shard_00000.h5" in said and "No such file" in said
    assert (run_dir / "checkpoints" / "step_00000200" / "manifest.json").exists()


def damage_last_chunk(shard: Path) -> int:
    """Flips a bit in the last chunk, which few sequences are in; returns its first token."""
    with h5py.File(shard) as file:
        tokens = file["tokens"].id
        info = tokens.get_chunk_info(tokens.get_num_chunks() - 1)
    with shard.open("r+b") as stream:
        stream.seek(info.byte_offset + 9)
        flipped = bytes([stream.read(1)[0] ^ 1])
        stream.seek(info.byte_offset + 9)
        stream.write(flipped)
    return int(info.chunk_offset[0])


def test_sequences_that_cannot_be_read_are_left_out(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The same ones on any number of ranks, and with local steps; their number goes on when the run does."""
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    begin = damage_last_chunk(data / "shard_00003.h5")
    opened = DataSet(data)
    length, batch = 32, 16
    windows = [(shard.n_tokens - 1) // length for shard in opened.train.shards]
    sampler = Sampler(windows, BatchSizes(batch), 0, opened.fingerprint)
    drawn = [pair for step in range(50) for pair in zip(*sampler.batch(step), strict=True)]
    expected = sum(shard == 3 and (window + 1) * length >= begin for shard, window in drawn)
    assert 5 < expected < 200
    options: dict[str, object] = {"data__on_corrupt": "skip", "compression__codec": "none"}
    for size in (1, 3):
        result = ranks.train(size, data, tmp_path / str(size), **options)
        assert result.status == 0, result.output
        said = re.findall(r"(\d+) sequences cannot be read and are left out, (\d+) so far", result.output)
        assert sum(int(count) for count, _ in said) == int(said[-1][1]) == expected
        assert "leaves out a sequence: " in result.output and "shard_00003.h5 cannot be read at chunk" in result.output
    assert_same_curve(losses(tmp_path / "3"), losses(tmp_path / "1"), 1e-4)
    first = ranks.train(2, data, tmp_path / "stopped", **options, stop_after=20)
    assert first.status == 75, first.output
    second = ranks.train(2, data, tmp_path / "stopped", "--resume", "latest", **options)
    local = ranks.train(2, data, tmp_path / "local", local_steps__every=4, local_steps__overlap=1, **options)
    for result in (second, local):
        assert f"left out, {expected} so far" in result.output, result.output


@pytest.mark.parametrize(
    "settings", [{}, {"local_steps__every": 4, "local_steps__overlap": 2}], ids=["", "local steps"]
)
def test_a_shard_that_breaks_in_mid_run_costs_no_step(
    settings: dict[str, object], ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    """With local steps all ranks end where the next round does."""
    data, run_dir = Path(shutil.copytree(small_data, tmp_path / "data")), tmp_path / "run"
    damage_last_chunk(data / "shard_00003.h5")
    result = ranks.train(2, data, run_dir, train__steps=2000, train__global_batch_size=2, **settings)
    assert result.status == 1, result.output
    (said,) = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    found = re.search(r"shard_00003\.h5.*; step (\d+) was saved: go on with --resume latest", said)
    assert found, said
    done = int(found[1])
    assert 1 < done <= max(losses(run_dir)) + (4 if settings else 0)
    assert (run_dir / "checkpoints" / f"step_{done:08d}" / "manifest.json").exists()


def test_fewer_steps_than_are_done(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The run is done, which is no reason to begin it again."""
    assert ranks.train(2, small_data, tmp_path / "run", train__steps=8).status == 0
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", train__steps=6)
    assert result.status == 0, result.output
    assert "all 6 steps are done: nothing to train" in result.output
    assert "stopped" not in result.output


def test_a_picture_that_cannot_be_written(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    result = ranks.train(1, small_data, tmp_path / "run", train__steps=5)
    assert result.status == 0, result.output
    assert f"hvdlm: warning: cannot draw {tmp_path / 'run' / 'loss.png'}: " in result.output
    assert "Traceback" not in result.output
