"""Runs whose ranks have parts of the model: stopped, killed, on disks that fail, and what they do not go with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from disks import small_disk
from jobs import (
    Ranks,
    assert_bit_identical,
    assert_same_curve,
    command,
    losses,
    records,
    start_training,
    train,
    train_on_shared_and_own_disks,
)
from launcher import launcher_command, run
from safetensors.torch import load_file
from test_resume import as_if_killed, wait_for_step
from test_saving import made, steps
from thorough import thorough

SAVING = {"checkpoint__every": 7, "model__dropout": 0.1}
STAGES = [1, 2, 3]
SOME_STAGES = [thorough(1), thorough(2), 3]  # the last has the most to keep
CODECS = {"none": "fp32", "int8": "bf16"}  # and the precision to try it in


@pytest.mark.parametrize("codec", [thorough("none"), "int8"])
@pytest.mark.parametrize("stage", SOME_STAGES)
def test_killed_and_resumed(stage: int, codec: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout and an average, and the same curve as ranks that each have all."""
    settings = {**SAVING, "checkpoint__keep": 9, "model__width": 64, "optimizer__lr": 0.002, "train__ema": 0.9}
    settings |= {"compression__codec": codec, "train__precision": CODECS[codec], "train__evaluate_every": 25}
    if codec != "none":
        settings["compression__weights"] = "int8" if stage == 3 else "int4"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = ranks.train(2, small_data, whole, parallel__shard=stage, **settings)
    assert result.status == 0, result.output
    as_if_killed(whole, broken, 17)
    result = ranks.train(2, small_data, broken, "--resume", "latest", parallel__shard=stage, **settings)
    assert result.status == 0, result.output
    assert "step_00000014, step 14" in result.output
    assert_bit_identical(whole, broken)
    validated = [[(each["loss"], each["ema_loss"]) for each in records(run, "eval")] for run in (whole, broken)]
    assert validated[0] == validated[1] and len(validated[0]) == 2
    if stage == 3:
        plain = tmp_path / "plain"
        settings.pop("compression__weights", None)
        assert ranks.train(2, small_data, plain, **settings).status == 0
        assert_same_curve(losses(whole), losses(plain), relative=1e-4 if codec == "none" else 0.02)


# Of ranks that divide a model: how many there are, [parallel], and which of them is killed
LAYOUTS: dict[str, tuple[int, dict[str, object], int]] = {
    "stage 3": (2, {"parallel__shard": 3}, 1),
    "tensor": (2, {"parallel__tensor": 2}, 1),
    "1f1b": (2, {"parallel__pipeline": 2}, 1),
    "zero_bubble": (2, {"parallel__pipeline": 2, "parallel__schedule": "zero_bubble"}, 0),
    "tensor and pipeline": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}, 2),
    "pipeline and stage 1": (4, {"parallel__pipeline": 2, "parallel__shard": 1}, 1),
}


@pytest.mark.parametrize("layout", [*map(thorough, list(LAYOUTS)[:-1]), list(LAYOUTS)[-1]])
def test_kill_of_a_rank(layout: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """By SIGKILL: the launcher ends the rest, and the run goes on as if nothing had been, with dropout."""
    size, parallel, victim = LAYOUTS[layout]
    settings = {**SAVING, **parallel}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = ranks.train(size, small_data, whole, **settings)
    assert result.status == 0, result.output
    with start_training("mpirun", size, small_data, broken, **settings) as job:
        wait_for_step(job, broken, 17)
        job.ranks()[victim].kill()
        assert job.finish(deadline=120).status != 0
    assert max(losses(broken)) < 50
    result = ranks.train(size, small_data, broken, "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert "resuming from" in result.output
    assert_bit_identical(whole, broken)


@pytest.mark.parametrize("stage", SOME_STAGES)
def test_a_signal(stage: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {**SAVING, "parallel__shard": stage}
    assert ranks.train(2, small_data, tmp_path / "whole", **settings).status == 0
    stopped = tmp_path / "stopped"
    assert ranks.train(2, small_data, stopped, stop_after=9, **settings).status == 75
    assert 9 <= max(losses(stopped)) <= 10
    assert max(made(stopped)) == max(losses(stopped))
    result = ranks.train(2, small_data, stopped, "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert_bit_identical(tmp_path / "whole", stopped)


@pytest.mark.thorough
def test_hosts_that_do_not_share_the_directory(small_data: Path, tmp_path: Path) -> None:
    """Rank 0 receives and writes what the others have: the files are those of ranks that share it."""
    options = {"checkpoint__every": 10, "compression__codec": "int4", "train__threads": 1, "parallel__shard": 3}
    shared, apart = train_on_shared_and_own_disks(small_data, tmp_path, **options)
    saved = Path("run") / "checkpoints" / "step_00000050"
    for name in ("model", "optimizer", "ranks/rank_00000", "ranks/rank_00002"):
        one, other = (load_file(each / saved / f"{name}.safetensors") for each in (shared.parent, apart / "0"))
        assert one.keys() == other.keys() != set()
        assert all(one[each].equal(other[each]) for each in one), name


def test_a_rank_that_cannot_write_its_part(small_data: Path, tmp_path: Path) -> None:
    """The checkpoint fails as a whole, the one before it stays, training goes on; the last one ends the job."""
    run_dir, body = tmp_path / "run", tmp_path / "body.py"
    body.write_text(
        "import os, sys\n"
        "from hvdlm.training import parts_file\n"
        "real = parts_file.write\n"
        "def write(path, parts):\n"
        "    is_last = 'step_00000020' in str(os.listdir(path.parent.parent))\n"
        "    if is_last and os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "        raise OSError(122, 'Disk quota exceeded')\n"
        "    real(path, parts)\n"
        "parts_file.write = write\n"
        "from hvdlm.cli import main\n"
        "sys.exit(main())\n"
    )
    words = command(small_data, run_dir, checkpoint__every=10, log__every=10, parallel__shard=2)[1:]
    result = run([*launcher_command("mpirun", 2), sys.executable, str(body), *words])
    assert result.status == 1, result.output
    assert made(run_dir) == steps(run_dir) == [10, 20]
    assert "step 30 was not saved: rank 1: cannot write" in result.output
    assert "model.safetensors: Disk quota exceeded" in result.output
    assert result.output.count("hvdlm: error:") == 1


@pytest.mark.thorough
@pytest.mark.needs_root
def test_a_disk_that_stays_full(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Room is asked for before anything is written: the checkpoint before is whole, and can be gone on from."""
    with small_disk(tmp_path / "disk", "600k"):
        run_dir = tmp_path / "disk" / "run"
        settings = {"checkpoint__every": 10, "log__every": 10, "parallel__shard": 3}
        result = ranks.train(2, small_data, run_dir, **settings)
        assert result.status == 1, result.output
        assert "step 20 was not saved: cannot write" in result.output
        (error,) = [line for line in result.output.splitlines() if "error:" in line]
        assert "No space left on device; make room, or choose another train.run_dir" in error
        assert steps(run_dir) == made(run_dir) == [10]
        resumed = ranks.train(3, small_data, tmp_path / "run", "--resume", str(run_dir), **settings)
    assert resumed.status == 0, resumed.output
    assert max(losses(tmp_path / "run")) == 50


# Ranks, and [parallel], that begin with weights
BEGINNINGS: list[tuple[int, dict[str, object]]] = [
    (2, {}),
    *((2, {"parallel__shard": stage}) for stage in STAGES),
    *((size, parallel) for name, (size, parallel, _) in LAYOUTS.items() if name not in ("stage 3", "zero_bubble")),
]


@pytest.mark.thorough
def test_weights_to_begin_with(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """`model.from`: the first losses are those of one rank, in any layout, of a vocabulary with more tokens."""
    start = tmp_path / "start"
    settings = {"train__steps": 3, "optimizer__warmup_steps": 0}
    assert ranks.train(2, small_data, start, **settings).status == 0
    found = []
    for number, (size, parallel) in enumerate([(1, {}), *BEGINNINGS]):
        run_dir = tmp_path / f"run {number}"
        larger = {"model__from": start, "model__vocab_size": 300}
        result = ranks.train(size, small_data, run_dir, **larger, **parallel, **settings)
        assert result.status == 0, result.output
        assert f"training begins with the weights of {start}/checkpoints/step_00000003, step 3" in result.output
        found.append(losses(run_dir))
    for each in found:
        assert_same_curve(each, found[0], relative=1e-5)
    assert found[0][1] < losses(start)[1] - 0.1


def test_useless_weights(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Numbers that are not finite are not saved, and every rank knows why."""
    run_dir = tmp_path / "run"
    settings = {"optimizer__lr": 1e30, "optimizer__clip_norm": 0, "optimizer__warmup_steps": 0, "checkpoint__every": 1}
    result = ranks.train(2, small_data, run_dir, parallel__shard=2, train__max_skipped=0, **settings)
    assert result.status == 1, result.output
    assert result.output.count("hvdlm: error:") == 1, result.output


@pytest.mark.parametrize("stage", [thorough(1), thorough(3)])
def test_under_horovodrun(stage: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Messages go over the communicator that engine horovod has beside Horovod: the curve is that under mpirun."""
    settings = {"parallel__shard": stage, "checkpoint__every": 25, "compression__codec": "int8"}
    result = train("horovodrun --gloo", 2, small_data, tmp_path / "run", **settings)
    assert result.status == 0, result.output
    assert ranks.train(2, small_data, tmp_path / "other", **settings).status == 0
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "other"), relative=1e-4)
    assert steps(tmp_path / "run") == [25, 50]


def test_ranks_that_cannot_be_arranged(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.train(3, small_data, tmp_path / "run", parallel__shard=1, parallel__data=2)
    assert result.status == 1
    assert result.output.count("3 ranks cannot be arranged by parallel.data = 2: start 2 or 4 ranks") == 1
    assert not (tmp_path / "run").exists()


def test_a_codec_of_ones_own(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """That has no half for owners: refused at the start, by one sentence."""
    sign = f"{Path(__file__).parents[2] / 'examples' / 'custom_codec' / 'sign.py'}:Sign"
    result = ranks.train(2, small_data, tmp_path / "run", parallel__shard=1, compression__codec=sign)
    assert result.status == 1
    assert result.output.count("cannot send gradients to their owners, as parallel.shard wants it") == 1


@pytest.mark.thorough
def test_a_model_that_one_rank_cannot_hold() -> None:
    """Of 60 million parameters, whose weights, gradients and moments take 910 MiB: four ranks with 600 MiB each train
    it, one rank cannot.
    """
    script = str(Path(__file__).with_name("memory_limit.py"))
    plain_malloc = ["env", "MALLOC_ARENA_MAX=1", "MALLOC_MMAP_THRESHOLD_=1000000"]  # nothing is kept, or spread out
    alone = run([*launcher_command("mpirun", 1), *plain_malloc, sys.executable, script, "0", "600"])
    assert alone.status != 0
    assert "can't allocate memory" in alone.output
    together = run([*launcher_command("mpirun", 4), *plain_malloc, sys.executable, script, "3", "600"])
    assert together.status == 0, together.output
