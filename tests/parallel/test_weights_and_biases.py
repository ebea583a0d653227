"""What Weights & Biases is told is metrics.jsonl: each step once, also after a resume from before the last steps."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import wandb
from jobs import Ranks, records
from wandb.proto.wandb_internal_pb2 import Record

from hvdlm.config import Config, LogSection
from hvdlm.errors import HvdlmError
from hvdlm.training.weights_and_biases import WeightsAndBiases, check_weights_and_biases

_BLOCK = 32 * 1024


def messages(file: Path) -> Iterator[bytes]:
    """Of a log of LevelDB (its doc/log_format.md) with 7 bytes before the first record: blocks of 32 KiB of parts, each
    after a checksum (4 bytes), its length (2) and its kind (1): whole, first, middle or last."""
    data, position, message = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if _BLOCK - position % _BLOCK < 7:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def told(run_dir: Path) -> dict[str, list[tuple[int, object]]]:
    """(step, value) in the order in which they were told, by name."""
    found: dict[str, list[tuple[int, object]]] = {}
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for message in messages(file):
            record = Record()
            record.ParseFromString(message)
            items = record.history.item if record.HasField("history") else ()
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            for name, value in row.items():
                found.setdefault(name, []).append((row["step"], value))
    return found


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """A process reads the environment once."""
    yield
    with suppress(OSError):  # a test may have ended its service
        wandb.teardown()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)


def test_each_step_once_after_two_resumes(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"log__wandb": "mine", "checkpoint__every": 4, "train__evaluate_every": 5, "WANDB_MODE": "offline"}
    settings["optimizer__schedule"] = "inverse_sqrt"  # whose rates do not depend on train.steps
    assert ranks.train(2, small_data, run_dir, train__steps=10, **settings).status == 0
    again = str(run_dir / "checkpoints" / "step_00000004")
    for steps in (6, 12):  # the second job ends before what the first has told
        assert ranks.train(2, small_data, run_dir, "--resume", again, train__steps=steps, **settings).status == 0
    values = told(run_dir)
    fields = {"train": ("loss", "mean_loss", "lr", "grad_norm"), "eval": ("loss", "accuracy")}
    for kind, names in fields.items():
        for name in names:
            points = values[f"{kind}/{name}"]
            expected = {int(str(each["step"])): each[name] for each in records(run_dir, kind)}
            assert len(dict(points)) == len(points)
            if name != "mean_loss":  # of fewer steps after a resume
                assert {step: dict(points)[step] for step in expected} == pytest.approx(expected, rel=1e-6)
    assert [step for step, _ in values["train/loss"]] == list(range(1, 13))
    messages = [str(message) for _, message in values["event/message"]]
    assert any("first step done" in message for message in messages)
    assert any("saved " in message and "step_00000004" in message for message in messages)
    own = json.loads((run_dir / "wandb.json").read_text(encoding="utf-8"))["id"]
    folders = [path.name for path in run_dir.glob("wandb/offline-run-*")]
    assert len(folders) == 3 and all(f"-{own}" in name for name in folders)  # of one run there


def test_without_a_login_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(HvdlmError, match=r"log\.wandb = 'mine': .*WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path, Config(log=LogSection(wandb="mine")))


def test_a_damaged_state_is_named(offline: None, tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text('{"id":', encoding="utf-8")
    with pytest.raises(HvdlmError, match=r"wandb\.json is damaged: remove it"):
        WeightsAndBiases(tmp_path, Config(log=LogSection(wandb="mine")))


def test_what_it_cannot_be_told_ends_nothing(offline: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view = WeightsAndBiases(tmp_path, Config(log=LogSection(wandb="mine")))
    view.show({"kind": "train", "step": 1, "loss": object()})
    view.show({"kind": "train", "step": 2, "loss": 1.0})
    view.close()
    ours = [each for each in caplog.records if each.name.startswith("hvdlm.")]
    assert [each.getMessage().partition(":")[0] for each in ours] == ["Weights & Biases gets no more"]


@pytest.mark.thorough
def test_a_service_that_has_gone_ends_nothing(offline: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view = WeightsAndBiases(tmp_path, Config(log=LogSection(wandb="mine")))
    (service,) = [each for each in psutil.Process().children() if "wandb-core" in " ".join(each.cmdline())]
    service.kill()
    while service.status() != psutil.STATUS_ZOMBIE:  # its own library waits for it
        time.sleep(0.01)
    view.close()
    ours = [each for each in caplog.records if each.name.startswith("hvdlm.")]
    assert [each.getMessage().partition(":")[0] for each in ours] == ["Weights & Biases gets no more"]


@pytest.mark.thorough
def test_without_the_package_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_weights_and_biases(LogSection())
    with pytest.raises(HvdlmError, match=r"needs Weights & Biases, .*pip install 'hvdlm\[wandb\]'"):
        check_weights_and_biases(LogSection(wandb="mine"))
