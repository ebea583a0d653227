"""Training jobs for tests: one small configuration, started as a user would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
from launcher import BIN, Job, Result, launcher_command, run, start
from pool import RankPool
from safetensors.torch import load_file

WAIT_SECONDS = 90.0

SETTINGS = {
    "model.layers": 2,
    "model.heads": 2,
    "model.width": 32,
    "model.context_length": 32,
    "train.steps": 50,
    "train.global_batch_size": 16,  # not divisible by 3
    "train.micro_batch_size": 3,
    "train.evaluate_sequences": 50,
    "train.check_replicas_every": 10,
    "optimizer.warmup_steps": 5,
    "optimizer.lr": 0.01,
    "log.every": 1,
}


def command(data: Path, run_dir: Path, *options: str, **overrides: object) -> list[str]:
    """`hvdlm train` with `SETTINGS`; `overrides` have `__` for the dot."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    config = run_dir.parent / "empty.toml"
    config.touch()
    settings = {**SETTINGS, "data.path": data, "train.run_dir": run_dir}
    settings.update({name.replace("__", "."): value for name, value in overrides.items()})
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [str(BIN / "hvdlm"), "train", str(config), *options, *words]


def train_on_shared_and_own_disks(data: Path, directory: Path, **options: object) -> tuple[Path, Path]:
    """The same run of three ranks twice: the run directory that all see, and the directory in which each rank has a
    folder of its own, as on hosts that share nothing, with rank 0's run in "0/run".
    """
    shared, apart = directory / "shared" / "run", directory / "apart"
    assert run([*launcher_command("mpirun", 3), *command(data, shared, **options)]).status == 0
    words = command(data, apart / "run", **options)
    words[words.index(str(apart / "run"))] = "run"
    script = f'mkdir -p {apart}/$OMPI_COMM_WORLD_RANK; cd {apart}/$OMPI_COMM_WORLD_RANK; exec "$0" "$@"'
    result = run([*launcher_command("mpirun", 3), "bash", "-c", script, *words])
    assert result.status == 0, result.output
    assert not (apart / "1" / "run").exists()
    return shared, apart


def train(launcher: str, ranks: int, data: Path, run_dir: Path, *options: str, **overrides: object) -> Result:
    return run([*launcher_command(launcher, ranks), *command(data, run_dir, *options, **overrides)])


def start_training(launcher: str, ranks: int, data: Path, run_dir: Path, *options: str, **overrides: object) -> Job:
    return start([*launcher_command(launcher, ranks), *command(data, run_dir, *options, **overrides)])


@dataclass(frozen=True)
class Ranks:
    """Runs `hvdlm` on ranks of a pool, where how they were started is not what a test is about."""

    pool: RankPool

    def hvdlm(
        self,
        ranks: int,
        *words: str,
        stop_after: int | None = None,
        overflow_at: Sequence[int] = (),
        **environment: str,
    ) -> Result:
        """`hvdlm WORDS...` on some ranks, which all return one status; the other arguments are `run_hvdlm`'s."""
        options = {"stop_after": stop_after, "overflow_at": overflow_at, "arguments": words, "environment": environment}
        answers = self.pool.run(Path(commands.__file__), "run_hvdlm", ranks, **options)
        output = "".join(answer.output for answer in answers)
        statuses = {answer.value for answer in answers}
        assert len(statuses) == 1, output
        return Result(statuses.pop(), output)

    def train(
        self,
        ranks: int,
        data: Path,
        run_dir: Path,
        *options: str,
        stop_after: int | None = None,
        overflow_at: Sequence[int] = (),
        **overrides: object,
    ) -> Result:
        """`overrides` of settings, SECTION__KEY; those in capitals are variables of the environment."""
        environment = {name: str(value) for name, value in overrides.items() if name.isupper()}
        settings = {name: value for name, value in overrides.items() if not name.isupper()}
        words = command(data, run_dir, *options, **settings)[1:]
        return self.hvdlm(ranks, *words, stop_after=stop_after, overflow_at=overflow_at, **environment)


def records(run_dir: Path, kind: str = "train") -> list[dict[str, object]]:
    """Those whose line is complete: a job may be writing the last one."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {int(str(record["step"])): float(str(record["loss"])) for record in records(run_dir)}


def assert_bit_identical(one: Path, other: Path) -> None:
    """Two runs of 50 steps."""
    assert losses(one) == losses(other)
    for name in ("model", "optimizer"):
        files = [run / "checkpoints" / "step_00000050" / f"{name}.safetensors" for run in (one, other)]
        first, second = (load_file(file) for file in files)
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)


def assert_same_curve(actual: dict[int, float], expected: dict[int, float], relative: float) -> None:
    assert actual.keys() == expected.keys()
    worst = max(abs(actual[step] / expected[step] - 1) for step in expected)
    assert worst <= relative, worst


def wait_for(condition: Callable[[], bool], job: Job) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            members = job.members()
            job.kill()
            pytest.fail(f"not within {WAIT_SECONDS:g} s; alive were {members}:\n{job.finish(WAIT_SECONDS).output}")
        time.sleep(0.05)
