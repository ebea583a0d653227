"""Ranks that die at any place: the others go on, and the run is the one in which nobody has died."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import assert_same_curve, command, losses, records
from launcher import Result, run
from thorough import thorough
from undisturbed import made_once

DYING = Path(__file__).with_name("dying.py")
MPIRUN = ["mpirun", "--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "-np"]
SETTINGS = {
    "train__steps": 30,
    "comm__elastic": "true",
    "comm__bucket_mb": 0.02,
    "comm__algorithm": "ring",
    "optimizer__lr": 0.002,
}
SAVING = {"checkpoint__every": 10, "train__evaluate_every": 10}


def train(ranks: int, plan: str, data: Path, run_dir: Path, **overrides: object) -> Result:
    """With deaths as dying.py has them; the job must end within 120 s and leave no process."""
    words = command(data, run_dir, **{**SETTINGS, **overrides})[1:]
    return run([*MPIRUN, str(ranks), sys.executable, str(DYING), plan, *words], deadline=120)


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`undisturbed(**overrides)`: the run directory of a run in which nobody dies, made once."""

    def train_whole(run_dir: Path, **overrides: object) -> Result:
        words = command(small_data, run_dir, **{**SETTINGS, "comm__elastic": "false", **overrides})
        return run([*MPIRUN, "2", *words])

    return made_once(train_whole, tmp_path_factory)


def assert_goes_on(result: Result, run_dir: Path, whole: Path, deaths: int, relative: float = 1e-4) -> None:
    """Status 0, every line once, and the curve of the run in which nobody has died."""
    assert result.status == 0, result.output
    said = [str(each["message"]) for each in records(run_dir, "event") if "died" in str(each["message"])]
    assert sum(each.count("rank ") for each in said) == deaths, said
    for kind in ("train", "eval"):
        own, expected = records(run_dir, kind), records(whole, kind)
        assert [each["step"] for each in own] == [each["step"] for each in expected]
        assert [each["tokens"] for each in own] == [each["tokens"] for each in expected]
    assert_same_curve(losses(run_dir), losses(whole), relative)
    for own, expected in zip(records(run_dir, "eval"), records(whole, "eval"), strict=True):
        assert abs(float(str(own["loss"])) / float(str(expected["loss"])) - 1) < relative


def test_one_after_the_other_at_every_place(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    plan = "data:3:1,forward:5:2,backward:8:3,bucket:12:4,sums:15:5,norm:18:6,update:22:7"
    result = train(8, plan, small_data, tmp_path / "run", **SAVING)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING), deaths=7)
    assert records(tmp_path / "run")[-1]["world_size"] == 1


def test_rank_0_and_those_that_follow_it(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """While it logs, validates, saves, and while the others go on."""
    plan = "log:4:0,validation:9:1,saving:19:2,forward:23:3,recovery:23:4,rebuilding:23:5"
    result = train(7, plan, small_data, tmp_path / "run", **SAVING)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING), deaths=6)
    assert records(tmp_path / "run")[-1]["world_size"] == 1


@pytest.mark.thorough
def test_while_the_batch_grows(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """2 sequences in batches 0 to 2, 4 in 3 to 5, ..., 16 from 21 on: two ranks have none at first."""
    ramp: dict[str, object] = {"train__batch_ramp_start": 2, "train__batch_ramp_steps": 21}
    plan = "bucket:2:3,data:3:0,update:13:1"
    result = train(4, plan, small_data, tmp_path / "run", **SAVING, **ramp)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING, **ramp), deaths=3)


def test_rank_0_dies_after_a_checkpoint_of_parts(small_data: Path, tmp_path: Path) -> None:
    """The next one had only written what it has of its own."""
    plan, best = "after_its_save:12:0", {"checkpoint__keep_best": "true", "compression__codec": "int4"}
    result = train(3, plan, small_data, tmp_path / "run", **SAVING, **best)
    assert result.status == 0, result.output
    said = [str(each["message"]) for each in records(tmp_path / "run", "event")]
    saved = [each.rpartition("/")[2] for each in said if each.startswith("saved ")]
    assert saved == ["step_00000010", "step_00000020", "step_00000030"]
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name in saved


def test_a_rank_that_is_one_step_behind(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """Some have completed the step of a death, others have not: those are told the norm."""
    plan = "update:7:3,kept_from_the_norm:7:0,update:12:1,kept_from_the_norm:12:2"
    result = train(4, plan, small_data, tmp_path / "run", **SAVING)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING), deaths=2)


@pytest.mark.thorough
def test_while_updates_of_muon_are_gathered(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """Those that wait for a dead rank's share complete the step alone; so does one that has not got the norm."""
    muon: dict[str, object] = {"optimizer__algorithm": "muon", "train__check_replicas_every": 1}
    plan = "orthogonalising:7:3,kept_from_the_norm:7:0,orthogonalising:12:1,bucket:19:2"
    result = train(4, plan, small_data, tmp_path / "run", **SAVING, **muon)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING, **muon), deaths=3, relative=2e-3)


def test_with_differential_privacy(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """The step under way is made again of the same batch, with one whole noise."""
    private: dict[str, object] = {"privacy__clip_norm": 0.5, "privacy__noise_multiplier": 0.3, "privacy__delta": 1e-6}
    private |= {"privacy__secure": "false", "privacy__accountant": "rdp", "train__steps": 12}
    result = train(3, "forward:5:0,bucket:9:2", small_data, tmp_path / "run", **private)
    assert_goes_on(result, tmp_path / "run", undisturbed(**private), deaths=2)
    spent = [[each["epsilon"] for each in records(run)] for run in (tmp_path / "run", undisturbed(**private))]
    assert spent[0] == spent[1]


def test_a_rank_that_is_stuck_ends_alone(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """By SIGKILL: mpirun ends all ranks when one exits with an error."""
    result = train(3, "stuck:7:1", small_data, tmp_path / "run", comm__timeout=6, **SAVING)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING), deaths=1)


def test_too_few_are_left(small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]) -> None:
    """The last step is saved, the status is one at which Slurm begins again, and the run goes on as if nothing was."""
    run_dir = tmp_path / "run"
    result = train(3, "backward:7:0", small_data, run_dir, comm__min_ranks=3, **SAVING)
    assert result.status == 75, result.output
    assert "fewer than comm.min_ranks = 3 are left" in result.output
    assert max(losses(run_dir)) == 7
    words = command(small_data, run_dir, "--resume", "latest", **{**SETTINGS, **SAVING})
    assert run([*MPIRUN, "3", *words]).status == 0
    assert_same_curve(losses(run_dir), losses(undisturbed(**SAVING)), relative=1e-4)


@pytest.mark.parametrize("ranks", [2, thorough(3)])
def test_without_comm_elastic_a_death_ends_the_job(ranks: int, small_data: Path, tmp_path: Path) -> None:
    """With a status that says so, also where one rank is left."""
    result = train(ranks, "backward:7:1", small_data, tmp_path / "run", comm__elastic="false")
    assert result.status not in (0, 75), result.output
    assert "another rank has died" in result.output
    assert max(losses(tmp_path / "run")) == 7


def test_without_mpirun_s_tolerance(small_data: Path, tmp_path: Path) -> None:
    words = command(small_data, tmp_path / "run", **SETTINGS)
    result = run(["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none", *words])
    assert result.status == 1
    assert result.output.count("start the job by mpirun --with-ft ulfm and engine mpi, or by") == 1, result.output


@pytest.mark.parametrize("codec", ["int4", thorough("topk"), thorough("powersgd")])
def test_a_mirrored_residual_outlives_its_rank(codec: str, small_data: Path, tmp_path: Path) -> None:
    """Before a step all ranks have not delivered as much as, after a death in it, those that are left."""
    plan = ",".join(f"saves_residuals:12:{rank}" for rank in range(3)) + ",codec:12:1"
    settings = {**SETTINGS, "compression__codec": codec, "model__width": 64, "comm__mirror_residuals": "true"}
    words = command(small_data, tmp_path / "run", **settings)[1:]
    launcher = [*MPIRUN, "3", "-x", f"HVDLM_SEQUENCES={tmp_path}"]
    result = run([*launcher, sys.executable, str(DYING), plan, *words], deadline=120)
    assert result.status == 0, result.output
    before = [torch.load(tmp_path / f"before_{rank}.pt") for rank in range(3)]
    after = [torch.load(tmp_path / f"after_{rank}.pt") for rank in (0, 2)]
    assert any(each.any() for each in before[1].values())
    for name, first in before[0].items():
        if "residual" not in name:
            continue  # the basis of powersgd, equal on all ranks
        expected = first + before[1][name] + before[2][name]
        torch.testing.assert_close(after[0][name] + after[1][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("codec", [thorough("int4"), thorough("topk"), "powersgd", thorough("dion")])
def test_what_survivors_have_not_delivered_stays(
    codec: str, small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    """When the third bucket of a step is about to be sent, the residuals of the first have changed: they are taken back
    bit for bit. What the dead rank had not delivered is gone, and the curve stays near.
    """
    settings: dict[str, object] = {"compression__codec": codec, "model__width": 64, "compression__density": 0.05}
    if codec == "dion":
        settings = {"optimizer__algorithm": "dion", "compression__codec": "int4", "model__width": 64}
    result = train(3, "codec:12:1,residuals:12:0,residuals:12:2", small_data, tmp_path / "run", **settings)
    assert_goes_on(result, tmp_path / "run", undisturbed(**settings), deaths=1, relative=0.05)
    for rank in (0, 2):
        assert f"rank {rank}: had changed [True], as before: True" in result.output, result.output
    (said,) = [str(each["message"]) for each in records(tmp_path / "run", "event") if "died" in str(each["message"])]
    assert re.search(r"; a residual of norm \d[\d.e-]*, when it was logged last, is lost", said), said


@pytest.mark.thorough
def test_the_moving_average_of_weights_goes_on(
    small_data: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    """A step that some ranks have completed is completed by the others; one that none has is averaged once."""
    ema = {"train__ema": 0.9}
    plan = "update:7:3,kept_from_the_norm:7:0,bucket:12:1"
    result = train(4, plan, small_data, tmp_path / "run", **SAVING, **ema)
    assert_goes_on(result, tmp_path / "run", undisturbed(**SAVING, **ema), deaths=2)
    own, expected = (records(run, "eval") for run in (tmp_path / "run", undisturbed(**SAVING, **ema)))
    for found, undisturbed_one in zip(own, expected, strict=True):
        assert abs(float(str(found["ema_loss"])) / float(str(undisturbed_one["ema_loss"])) - 1) < 1e-4
