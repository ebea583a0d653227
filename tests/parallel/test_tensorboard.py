"""What TensorBoard shows is metrics.jsonl: each step once, also after a resume from before the last steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Ranks, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdlm.config import LogSection
from hvdlm.errors import HvdlmError
from hvdlm.training.tensorboard import TensorBoard, check_tensorboard


def shown(run_dir: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in scalars.values())  # no step twice
    return {tag: dict(points) for tag, points in scalars.items()}


def test_each_step_once_after_a_resume(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"log__tensorboard": "true", "checkpoint__every": 4, "train__evaluate_every": 5}
    assert ranks.train(2, small_data, run_dir, train__steps=10, **settings).status == 0
    again = str(run_dir / "checkpoints" / "step_00000004")
    assert ranks.train(2, small_data, run_dir, "--resume", again, train__steps=10, **settings).status == 0
    scalars = shown(run_dir)
    fields = {"train": ("loss", "lr", "grad_norm", "tokens_per_second"), "eval": ("loss", "accuracy")}
    for kind, names in fields.items():
        for name in names:
            expected = {int(str(each["step"])): float(str(each[name])) for each in records(run_dir, kind)}
            assert scalars[f"{kind}/{name}"] == pytest.approx(expected, rel=1e-6)
    assert sorted(scalars["train/loss"]) == list(range(1, 11))


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").touch()
    view = TensorBoard(tmp_path, start=0)
    view.show({"kind": "train", "step": 1, "loss": 1.0})
    view.close()
    assert len(caplog.messages) == 1
    assert f"cannot write {tmp_path / 'tensorboard'}, so TensorBoard gets no more: " in caplog.text


def test_without_tensorboard_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tensorboard(LogSection())
    with pytest.raises(HvdlmError, match=r"needs TensorBoard, .*pip install 'hvdlm\[tensorboard\]'"):
        check_tensorboard(LogSection(tensorboard=True))
