"""`train.deterministic`: what it turns on, and the sentence where PyTorch has no such kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.model import check_deterministic, make_model

CPU = torch.device("cpu")


def settings(*words: str, deterministic: str = "true") -> Config:
    small = ["--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--model.context_length", "8"]
    return load(None, ["--train.deterministic", deterministic, *small, *words], PRESETS)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_it_is_turned_on_for_a_run_and_off_for_the_next() -> None:
    make_model(settings(), 10, CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    make_model(settings(deterministic="false"), 10, CPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_user_has_set_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_model(settings(), 10, CPU)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("preset", ["tiny", "llama-1b"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("document_mask", ["false", "true"])
def test_a_cpu_has_every_kernel(preset: str, precision: str, document_mask: str) -> None:
    words = ["--model.preset", preset, "--model.document_mask", document_mask, "--train.precision", precision]
    check_deterministic(load(None, ["--train.deterministic", "true", *words], PRESETS), CPU)


def test_a_kernel_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation ..."
        )

    monkeypatch.setattr("hvdlm.training.model.token_loss", fail)
    with pytest.raises(HvdlmError) as caught:
        check_deterministic(settings(), CPU)
    assert str(caught.value) == (
        "train.deterministic = true, but not on cpu with this PyTorch: cumsum_cuda_kernel does not have a "
        "deterministic implementation; set it to false, or change the setting of [model] or train.precision that needs "
        "this kernel"
    )
    check_deterministic(settings(deterministic="false"), CPU)


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("hvdlm.training.model.token_loss", fail)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        check_deterministic(settings(), CPU)
