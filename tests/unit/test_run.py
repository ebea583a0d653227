"""What a run is resumed from: only a checkpoint of the same model, data and order of samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.training.run import _check_resumable

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
