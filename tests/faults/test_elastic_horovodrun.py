"""Ranks that die, leave and join under an elastic horovodrun: the run is the one in which nothing of it has happened.

horovodrun drops a whole host when a process on it fails, so each rank here is on a host of its own: names by which this
machine knows itself, of which none needs ssh.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from jobs import assert_same_curve, command, losses, records, wait_for
from launcher import Job, Result, run, start
from thorough import thorough
from undisturbed import made_once

DYING = Path(__file__).with_name("dying.py")
HOSTS = ("localhost", "127.0.0.1", "127.1", "127.0.1", "127.0.00.1", "127.0.0.01")
DEADLINE = 120.0  # seconds

SETTINGS = {
    "train__steps": 30,
    "comm__bucket_mb": 0.02,
    "comm__algorithm": "ring",
    "comm__timeout": 30,
    "optimizer__lr": 0.002,
}
SAVING = {"checkpoint__every": 10, "train__evaluate_every": 10}


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`undisturbed(**overrides)`: the run directory of a run of one process, made once."""

    def train_whole(run_dir: Path, **overrides: object) -> Result:
        return run(command(small_data, run_dir, **{**SETTINGS, **overrides}))

    return made_once(train_whole, tmp_path_factory)


class Fleet:
    """The hosts that a discovery script prints, and a job on them."""

    def __init__(self, data: Path, directory: Path) -> None:
        self._data, self._directory = data, directory
        self.run_dir = directory / "run"

    def set_hosts(self, *hosts: str) -> None:
        """`hosts`: each with its number of slots, `localhost:1`."""
        file = self._directory / "new hosts"
        file.write_text("".join(f"{each}\n" for each in hosts), encoding="utf-8")
        file.rename(self._directory / "hosts")

    def start(
        self, plan: str, ranks: int, options: Sequence[str] = (), rest: float = 0.0, **overrides: object
    ) -> AbstractContextManager[Job]:
        """With deaths as dying.py has them; `rest`: seconds that a rank rests in each step."""
        script = self._directory / "discover"
        script.write_text(f"#!/bin/sh\ncat '{self._directory}/hosts'\n", encoding="utf-8")
        script.chmod(0o755)
        words = command(self._data, self.run_dir, **{**SETTINGS, "comm__elastic": "true", **overrides})[1:]
        launcher = ["horovodrun", "-np", str(ranks), "--min-np", "1", "--max-np", "8", "--network-interfaces", "lo"]
        launcher += ["--host-discovery-script", str(script), *options]
        return start([*launcher, sys.executable, str(DYING), plan, *words], {"HVDLM_REST": str(rest)})

    def run(self, plan: str, hosts: Sequence[str], options: Sequence[str] = (), **overrides: object) -> Result:
        """On hosts that all stay."""
        self.set_hosts(*hosts)
        ranks = sum(int(each.partition(":")[2]) for each in hosts)
        with self.start(plan, ranks, options, **overrides) as job:  # type: ignore[arg-type]
            return job.finish(DEADLINE)

    def step(self) -> int:
        """The last one that is logged."""
        return max(losses(self.run_dir), default=0) if (self.run_dir / "metrics.jsonl").exists() else 0

    def said(self, word: str) -> list[str]:
        """Events with this word."""
        return [str(each["message"]) for each in records(self.run_dir, "event") if word in str(each["message"])]


@pytest.fixture
def fleet(small_data: Path, tmp_path: Path) -> Fleet:
    return Fleet(small_data, tmp_path)


def on_own_hosts(ranks: int) -> list[str]:
    return [f"{host}:1" for host in HOSTS[:ranks]]


def assert_goes_on(result: Result, fleet: Fleet, whole: Path, deaths: int, relative: float = 1e-4) -> None:
    """Status 0, every line once, and the curve of the run in which nobody has died."""
    assert result.status == 0, result.output
    said = fleet.said("died")
    names = [name for each in said for name in each.partition(" died")[0].split(", ")]
    assert len(names) == deaths, said
    for kind in ("train", "eval"):
        own, expected = records(fleet.run_dir, kind), records(whole, kind)
        assert [each["step"] for each in own] == [each["step"] for each in expected]
        assert [each["tokens"] for each in own] == [each["tokens"] for each in expected]
    assert_same_curve(losses(fleet.run_dir), losses(whole), relative)
    for one, other in zip(records(fleet.run_dir, "eval"), records(whole, "eval"), strict=True):
        assert abs(float(str(one["loss"])) / float(str(other["loss"])) - 1) < relative


def test_ranks_of_horovodrun_die_one_after_the_other(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """Also while the others regroup: before a rank has asked horovodrun for its place, and when it has one."""
    plan = "data:3:1,regrouping:3:2,backward:8:3,meeting:8:4,bucket:12:5"
    result = fleet.run(plan, on_own_hosts(6), **SAVING)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=5)
    assert records(fleet.run_dir)[-1]["world_size"] == 1


def test_rank_0_of_horovodrun_and_those_that_follow_it(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """While it logs, validates, saves, and while the others agree how to go on."""
    plan = "log:4:0,validation:9:1,saving:19:2,forward:23:3,recovery:23:4"
    result = fleet.run(plan, on_own_hosts(6), **SAVING)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=5)
    first, second, last = (each.rpartition("_")[2] for each in fleet.said("saved "))
    assert (first, last) == ("00000010", "00000030")
    assert "00000020" <= second < "00000024"  # the others may train on while it dies


@pytest.mark.thorough
def test_a_rank_of_horovodrun_that_is_one_step_behind(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """Some have completed the step of a death, others have not: those are told the norm."""
    plan = "update:7:3,kept_from_the_norm:7:0,update:12:1,kept_from_the_norm:12:2"
    result = fleet.run(plan, on_own_hosts(4), **SAVING)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=2)


@pytest.mark.thorough
def test_all_ranks_of_a_host_leave_with_one_that_dies(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    result = fleet.run("forward:8:1", ["localhost:2", "127.0.0.1:2"], **SAVING)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=2)
    assert "rank 0 on" in fleet.said("died")[0]
    assert result.output.count("horovodrun has no place for it any more") == 1, result.output


def test_a_process_joins_and_goes_on_alone(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """It has model, moments and step: when those that were there before it have died, the curve is the same."""
    fleet.set_hosts("localhost:1", "127.0.0.1:1")
    with fleet.start("forward:20:0,backward:24:1", 2, rest=0.2, **SAVING) as job:
        wait_for(lambda: fleet.step() > 2, job)
        fleet.set_hosts("localhost:1", "127.0.0.1:1", "127.1:1")
        result = job.finish(DEADLINE)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=2)
    (joined,) = fleet.said("joined")
    assert ": 3 ranks go on from step " in joined
    assert [records(fleet.run_dir)[step]["world_size"] for step in (0, 18, 22, 29)] == [2, 3, 2, 1]


def test_a_host_comes_back(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """Where horovodrun was told for how long one stays away on which a rank has died."""
    options = ["--blacklist-cooldown-range", "1", "2"]
    fleet.set_hosts(*on_own_hosts(3))
    with fleet.start("forward:3:2", 3, options, rest=0.5, **SAVING) as job:
        result = job.finish(DEADLINE)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=1)
    assert len(fleet.said("joined")) == 1
    assert [records(fleet.run_dir)[step]["world_size"] for step in (0, 29)] == [3, 3]


@pytest.mark.thorough
def test_the_first_host_is_taken_away(fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """Another one takes over log and checkpoints, and no rank counts as dead."""
    fleet.set_hosts(*on_own_hosts(3))
    with fleet.start("", 3, rest=0.2, **SAVING) as job:
        wait_for(lambda: fleet.step() > 11, job)
        fleet.set_hosts(*on_own_hosts(3)[1:])
        result = job.finish(DEADLINE)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=0)
    assert len(fleet.said("left")) == 1
    assert records(fleet.run_dir)[-1]["world_size"] == 2


def test_too_few_are_left_under_horovodrun(fleet: Fleet) -> None:
    result = fleet.run("backward:7:0", on_own_hosts(3), comm__min_ranks=3, **SAVING)
    assert result.status == 1, result.output  # of each rank it is 75, which horovodrun does not pass on
    assert "fewer than comm.min_ranks = 3 are left" in result.output
    assert max(losses(fleet.run_dir)) == 7
    assert [each.name for each in (fleet.run_dir / "checkpoints").glob("step_*")] == ["step_00000007"]


@pytest.mark.parametrize("fault", ["unfit", thorough("preparing")])
def test_a_process_that_cannot_join(fault: str, fleet: Fleet, undisturbed: Callable[..., Path]) -> None:
    """It has another version of hvdlm, or dies before it has joined: the others go on without it."""
    fleet.set_hosts(*on_own_hosts(2))
    with fleet.start(f"{fault}:-1:2", 2, rest=0.2, **SAVING) as job:
        wait_for(lambda: fleet.step() > 2, job)
        fleet.set_hosts(*on_own_hosts(3))
        result = job.finish(DEADLINE)
    assert_goes_on(result, fleet, undisturbed(**SAVING), deaths=0)
    assert records(fleet.run_dir)[-1]["world_size"] == 2
    if fault == "unfit":
        assert result.output.count("ranks differ in hvdlm: rank 0 on") == 1, result.output


@pytest.mark.parametrize("codec", ["int4", thorough("powersgd"), thorough("dion")])
def test_what_ranks_have_not_delivered_stays_when_others_join(
    codec: str, fleet: Fleet, undisturbed: Callable[..., Path]
) -> None:
    """A rank dies in the middle of a step, then one joins: residuals of the others are theirs bit for bit, and ranks
    stay replicas of each other, which train.check_replicas_every compares.
    """
    settings: dict[str, object] = {"compression__codec": codec, "model__width": 64, "train__check_replicas_every": 1}
    if codec == "dion":
        settings |= {"optimizer__algorithm": "dion", "compression__codec": "int4"}
    fleet.set_hosts(*on_own_hosts(3))
    with fleet.start("codec:12:1,residuals:12:0,residuals:12:2", 3, rest=0.2, **settings) as job:
        wait_for(lambda: fleet.step() > 13, job)
        fleet.set_hosts(*on_own_hosts(4))
        result = job.finish(DEADLINE)
    assert_goes_on(result, fleet, undisturbed(**settings), deaths=1, relative=0.05)
    assert [records(fleet.run_dir)[step]["world_size"] for step in (12, 29)] == [2, 3]
    for rank in (0, 2):
        for had_changed in ([True], [True, False]):
            assert f"rank {rank}: had changed {had_changed}, as before: True" in result.output, result.output


def test_an_ordinary_horovodrun(small_data: Path, tmp_path: Path) -> None:
    words = command(small_data, tmp_path / "run", **{**SETTINGS, "comm__elastic": "true"})
    result = run(["horovodrun", "--gloo", "-np", "2", "-H", "localhost:2", *words])
    assert result.status == 1
    assert result.output.count("or by horovodrun --host-discovery-script (this is engine horovod)") == 1, result.output
