"""What a run is resumed from, only a checkpoint of the same model, data and order of samples; whose a directory is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from socket import gethostname
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.training import checkpoint
from hvdlm.training.retention import Retention
from hvdlm.training.run_directory import RunDirectory, _check_resumable

DATA: Any = SimpleNamespace(fingerprint="f", path=Path("data"))


def state_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {"path": "run/step_00000010", "config": settings, "fingerprint": "f", "vocab_size": 257}


def test_the_same_settings_can_go_on() -> None:
    config = Config()
    _check_resumable(state_of(config.model_dump()), config, DATA, 257)


def test_another_global_batch_is_named() -> None:
    config = Config()
    settings = config.model_dump()
    settings["train"]["global_batch_size"] = 7
    with pytest.raises(HvdlmError, match=r"made with train.global_batch_size = 7, not 32"):
        _check_resumable(state_of(settings), config, DATA, 257)


def test_settings_that_are_not_known_any_more_are_named() -> None:
    config = Config()
    settings = config.model_dump()
    settings["train"]["batch_size"] = settings["train"].pop("global_batch_size")
    with pytest.raises(
        HvdlmError, match=r"^run/step_00000010: unknown key train.batch_size \(did you mean train.global"
    ):
        _check_resumable(state_of(settings), config, DATA, 257)


# ---- whose a directory is


def make_run(path: Path, *steps: int) -> Path:
    """A run directory that holds checkpoints of the default settings."""
    for step in steps:
        state = {"step": step, "config": Config().model_dump(), "fingerprint": "f", "vocab_size": 257}
        tensors = {"w": torch.full((2,), float(step))}
        checkpoint.save(checkpoint.directory(path), step, tensors, tensors, state, b"{}", keep=Retention(9))
    saved = [{"kind": "event", "step": step, "message": f"saved step {step}"} for step in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in saved))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def open_run(path: Path, resume: str | None, config: Config | None = None, file: Path | None = None) -> RunDirectory:
    directory = RunDirectory(path)
    directory.open(config or Config(), file, resume, DATA, 257)
    return directory


def test_a_second_job_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = open_run(make_run(tmp_path / "run", 10), "latest")
    before = contents(tmp_path)
    with pytest.raises(HvdlmError, match=rf"another job trains in .*run \(process {os.getpid()} on {gethostname()}\)"):
        open_run(tmp_path / "run", "latest")
    assert contents(tmp_path) == before
    first.close()
    open_run(tmp_path / "run", "latest").close()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    child = os.fork()
    if child == 0:
        open_run(run, "latest")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    open_run(run, "latest").close()


def test_a_checkpoint_of_elsewhere_does_not_go_on_in_a_directory_with_a_run(tmp_path: Path) -> None:
    other, own = make_run(tmp_path / "a", 10), make_run(tmp_path / "b", 20)
    before = contents(own)
    source = other / "checkpoints" / "step_00000010"
    with pytest.raises(HvdlmError, match=r"b holds a run of its own, which going on from .*a/check.* would overwrite"):
        open_run(own, str(source))
    assert contents(own) == before
    open_run(own, str(own / "checkpoints" / "step_00000020")).close()
    open_run(tmp_path / "new", str(source)).close()


def test_checkpoints_that_are_gone_do_not_begin_a_run_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    (run / "checkpoints").rename(tmp_path / "moved")
    before = contents(run)
    with pytest.raises(HvdlmError, match=r"run holds no checkpoint any more, though metrics.jsonl says: saved step 10"):
        open_run(run, "latest")
    assert {name: content for name, content in contents(run).items() if name != ".lock"} == before


@pytest.mark.parametrize("kind", ["dangling link", "file"])
def test_where_checkpoints_cannot_be_written_is_found_at_the_start(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if kind == "file":
        (run / "checkpoints").touch()
    else:
        (run / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(HvdlmError, match=rf"cannot write to train.run_dir = {run} \({run}/checkpoints\): File exists"):
        open_run(run, None)


def test_the_configuration_that_was_given_is_not_rewritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    own = run / "config.toml"
    own.write_text("# a comment of mine\n[train]\nsteps = 1000\n")
    open_run(run, "latest", file=own).close()
    assert own.read_text().startswith("# a comment of mine")
    open_run(run, "latest", file=tmp_path / "other.toml").close()
    assert own.read_text().startswith("[model]")


def test_nothing_is_left_of_a_directory_that_was_made_in_vain(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match="holds no checkpoint"):
        open_run(tmp_path / "new", str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_settings_that_changed_are_told(tmp_path: Path) -> None:
    config = Config()
    changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 0.5})})
    directory = open_run(make_run(tmp_path / "run", 10), "latest", changed)
    assert directory.changed_settings == [f"optimizer.lr is 0.5, and was {config.optimizer.lr} up to here"]
    directory.close()
