"""Servers that are processes of their own, and workers that join, leave and die: each share of a batch counts once."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from forked import hvdlm
from jobs import assert_same_curve, command, losses, records, train
from launcher import Result, launcher_command, run
from served import DEADLINE, SHARES, Served, process_of
from test_resume import wait_for_step

from hvdlm.training.checkpoint import open_state

STEPS = 30
TOKEN = {"HVDLM_SERVER_TOKEN": "0" * 64}  # of no server
# A rate at which one rounding does not grow into another curve, and does not depend on how many steps there are
SETTINGS = {
    "train__steps": STEPS,
    "train__evaluate_every": 15,
    "checkpoint__every": 5,
    "checkpoint__keep": 9,
    "optimizer__lr": 0.001,
    "optimizer__schedule": "inverse_sqrt",
    "comm__bucket_mb": 0.02,
    "comm__timeout": 60,
}


@pytest.fixture(scope="module")
def alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by one process, for some steps more."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = train("none", 1, small_data, run_dir, **{**SETTINGS, "train__steps": STEPS + 10})
    assert result.status == 0, result.output
    return run_dir


def validation(run_dir: Path) -> dict[int, float]:
    return {int(str(each["step"])): float(str(each["loss"])) for each in records(run_dir, "eval")}


def assert_curve_of(alone: Path, run_dir: Path, steps: int, relative: float) -> None:
    expected = {step: loss for step, loss in losses(alone).items() if step <= steps}
    assert_same_curve(losses(run_dir), expected, relative)


def assert_ends(result: Result, status: int, sentence: str) -> None:
    assert result.status == status, result.output
    assert result.output.count(sentence) == 1, result.output


@pytest.mark.parametrize("servers", [1, 2])
def test_the_curve_of_one_worker(servers: int, small_data: Path, tmp_path: Path, alone: Path) -> None:
    """Is that of training alone, which then goes on from the servers' last checkpoint; validations too."""
    with Served(tmp_path, small_data, servers=servers, **SETTINGS) as served:
        with served.worker() as worker:
            assert_ends(worker.finish(DEADLINE), 0, "training is finished")
        result = served.job.finish(DEADLINE)
    assert result.status == 0, result.output
    assert_curve_of(alone, served.run, STEPS, 1e-6)
    assert validation(served.run).keys() == {15, 30}
    for step, loss in validation(served.run).items():
        assert abs(loss / validation(alone)[step] - 1) < 1e-6
    assert {record["staleness"] for record in records(served.run)} == {0.0}
    assert {record["world_size"] for record in records(served.run)} == {1}
    assert (served.run / "loss.png").exists() and not (tmp_path / "worker" / "run").exists()
    more = {**SETTINGS, "train__steps": STEPS + 10}
    result = train("none", 1, small_data, served.run, "--resume", "latest", **more)
    assert result.status == 0, result.output
    assert_curve_of(alone, served.run, STEPS + 10, 1e-5)


@pytest.mark.parametrize("servers", [1, 3])
def test_workers_come_and_go(servers: int, small_data: Path, tmp_path: Path) -> None:
    """The first one is killed in the midst of a push; of the next two one is asked to stop; the last comes late. All
    servers add the same shares in one order.
    """
    with Served(tmp_path, small_data, servers=servers, **SETTINGS) as served:
        with served.worker("0:7") as killed:
            assert killed.finish(DEADLINE).status == -signal.SIGKILL
        served.wait_for_events("has gone, and a share of batch 2 is handed out again: 0 workers")
        served.wait_for_events("no worker is there: waiting until one joins", 2)
        with served.worker("0:rests") as slow, served.worker("0:rests") as leaving:
            served.wait_for_events(": 2 workers")
            leaving.process.send_signal(signal.SIGTERM)
            assert_ends(leaving.finish(DEADLINE), 75, "as it was asked to")
            served.wait_for_events("leaves")
            with served.worker() as late:
                assert_ends(late.finish(DEADLINE), 0, "training is finished")
            assert_ends(slow.finish(DEADLINE), 0, "training is finished")
        result = served.job.finish(DEADLINE)
    assert result.status == 0, result.output
    assert Counter(served.tasks("ADD")) == Counter(range(STEPS * SHARES))
    assert 7 in served.tasks("DROP")
    for server in range(1, servers):
        orders = [[record for record in served.log(each) if record[0] == "task"] for each in (0, server)]
        assert orders[0] == orders[1]
    assert list(losses(served.run)) == list(range(1, STEPS + 1))
    assert max(float(str(record["staleness"])) for record in records(served.run)) <= 4


@pytest.mark.parametrize(("servers", "killed"), [(1, 0), (2, 0), (2, 1)])
def test_kill_of_a_server(servers: int, killed: int, small_data: Path, tmp_path: Path, alone: Path) -> None:
    """Its worker ends with a sentence, and other servers. All are started again, with the token from before, as one
    server, and the curve goes on.
    """
    with Served(tmp_path, small_data, servers=servers, **SETTINGS) as served, served.worker("0:rests") as worker:
        token = (served.run / "token").read_text()
        wait_for_step(served.job, served.run, 12)
        process_of(served.job, killed).kill()
        assert_ends(worker.finish(DEADLINE), 1, f"the server at {served.address} has gone")
        assert served.job.finish(DEADLINE).status
    with Served(tmp_path, small_data, "--resume", "latest", **SETTINGS) as served:
        assert max(losses(served.run)) == 10  # of the newest checkpoint
        with served.worker(token=token) as worker:
            assert worker.finish(DEADLINE).status == 0
        result = served.job.finish(DEADLINE)
    assert result.status == 0, result.output
    assert_curve_of(alone, served.run, STEPS, 1e-5)


@pytest.mark.parametrize(("has_worker", "servers"), [(True, 1), (False, 1), (True, 2), (False, 2)])
def test_a_signal_to_servers(has_worker: bool, servers: int, small_data: Path, tmp_path: Path, alone: Path) -> None:
    """They end when the batches that have been begun are done: by their worker, or by themselves if that has died."""
    fault = "0:rests" if has_worker else "0:7"
    with Served(tmp_path, small_data, servers=servers, **SETTINGS) as served, served.worker(fault) as worker:
        if has_worker:
            wait_for_step(served.job, served.run, 7)
        else:
            worker.finish(DEADLINE)
            served.wait_for_events("has gone")
        process_of(served.job, servers - 1).send_signal(signal.SIGTERM)
        assert_ends(served.job.finish(DEADLINE), 75, "go on with --resume latest")
        if has_worker:
            assert_ends(worker.finish(DEADLINE), 75, "was stopped: start it again")
    step = int(open_state(served.run)["step"])
    assert step == max(losses(served.run)) and (step >= 7 if has_worker else step == 3)
    with Served(tmp_path, small_data, "--resume", "latest", servers=3 - servers, **SETTINGS) as served:
        with served.worker() as worker:
            assert worker.finish(DEADLINE).status == 0
        assert served.job.finish(DEADLINE).status == 0
    assert_curve_of(alone, served.run, STEPS, 1e-5)


def test_a_worker_that_stands_still(small_data: Path, tmp_path: Path) -> None:
    """Its share is handed out again after comm.timeout; when it goes on it is told that it is too late."""
    settings = {**SETTINGS, "comm__timeout": 5}
    with Served(tmp_path, small_data, **settings) as served, served.worker("0:rests") as still:
        served.wait_for_events("joins:")
        wait_for_step(served.job, served.run, 1)
        still.process.send_signal(signal.SIGSTOP)
        with served.worker() as worker:
            assert worker.finish(DEADLINE).status == 0
        assert served.job.finish(DEADLINE).status == 0
        still.process.send_signal(signal.SIGCONT)
        assert_ends(still.finish(DEADLINE), 1, "has gone")
    assert "for it takes longer than 5 s (comm.timeout) for a share" in served.events("is disconnected")[0]
    assert Counter(served.tasks("ADD")) == Counter(range(STEPS * SHARES))


def test_servers_that_wait_for_long(small_data: Path, tmp_path: Path) -> None:
    """After a validation nobody is there for three times comm.timeout: they are not stuck, and go on with who comes."""
    settings = {**SETTINGS, "train__evaluate_every": 5, "comm__timeout": 4}
    with Served(tmp_path, small_data, servers=2, **settings) as served:
        with served.worker("0:16") as killed:  # in the midst of batch 5
            killed.finish(DEADLINE)
        served.wait_for_events("has gone, and a share of batch 5 is handed out again")
        time.sleep(12)
        with served.worker() as worker:
            assert_ends(worker.finish(DEADLINE), 0, "training is finished")
        result = served.job.finish(DEADLINE)
    assert result.status == 0, result.output
    assert validation(served.run).keys() == set(range(5, STEPS + 1, 5))


def test_who_is_refused(small_data: Path, tmp_path: Path) -> None:
    """Workers with other settings, without the token or with another one; the server lives, and then stops at once."""
    with Served(tmp_path, small_data, **SETTINGS) as served:
        for settings, sentence in (
            ({"train__seed": 1}, "it has train.seed = 1, which is 0 on the server; give both one configuration"),
            (
                {"token": TOKEN["HVDLM_SERVER_TOKEN"]},
                "has closed the connection: give the token that hvdlm serve has written",
            ),
            ({"token": ""}, "needs the token of that server: set server.token_file"),
        ):
            with served.worker(**settings) as worker:  # type: ignore[arg-type]
                assert_ends(worker.finish(DEADLINE), 1, sentence)
        with served.worker("0:rests", token="", server__token_file=served.run / "token") as worker:
            served.wait_for_events("joins:")
            worker.process.kill()
        served.wait_for_events("has gone")
        assert len(served.events("joins:")) == 1
        served.job.process.send_signal(signal.SIGTERM)
        assert served.job.finish(DEADLINE).status == 75


def test_what_cannot_begin(small_data: Path, tmp_path: Path) -> None:
    """One sentence, and no run directory."""
    other = {"server__max_staleness": 4, "server__listen": "127.0.0.1:0"}

    def refused(command_name: str, sentence: str, *options: str, ranks: int = 1, **settings: object) -> None:
        program, _, *words = command(small_data, tmp_path / "run", *options, **settings)
        if ranks > 1:
            result = run([*launcher_command("mpirun", ranks), program, command_name, *words], DEADLINE, TOKEN)
        else:
            done = hvdlm(command_name, *words, cwd=tmp_path, **TOKEN)
            result = Result(done.returncode, done.stdout + done.stderr)
        assert result.status == 1, result.output
        assert sentence in result.output and result.output.count("hvdlm: error:") == 1, result.output
        assert not (tmp_path / "run").exists()

    with Served(tmp_path / "served", small_data, **SETTINGS) as served:
        taken = {**other, "server__listen": served.address}
        refused("serve", f"cannot listen at server.listen = {served.address}: Address already in use", **taken)
        served.job.process.send_signal(signal.SIGTERM)
        assert served.job.finish(DEADLINE).status == 75
    refused("train", "cannot be reached: Connection refused", server__address=served.address)
    refused(
        "train",
        "server.address = no-such-host.invalid:7000 cannot be reached",
        server__address="no-such-host.invalid:7000",
    )
    refused("train", "--resume is of its hvdlm serve", "--resume", "latest", server__address=served.address)
    refused("train", "server.listen is of hvdlm serve", **other)
    refused("serve", "hvdlm serve needs server.listen")
    refused("train", "a process of its own, and mpirun has started 2", ranks=2, server__address=served.address)
