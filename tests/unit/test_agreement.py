"""What ranks must share, compared when each knows its data and its device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_launch import RankOf

from hvdlm.comm import agreement as software
from hvdlm.comm.agreement import Shared
from hvdlm.config import CompressionSection, Config, OptimizerSection
from hvdlm.errors import JobError
from hvdlm.training import agreement
from hvdlm.training.agreement import (
    check_data_matches,
    check_devices_match,
    codec_digests,
    rates_digest,
    update_digest,
)

CPU = torch.device("cpu")


def data(fingerprint: str, vocab_size: int = 257) -> Any:
    return SimpleNamespace(path="data/small", fingerprint=fingerprint * 16, vocab_size=vocab_size)


def other(subject: str, value: str) -> Callable[[dict[str, str]], dict[str, str]]:
    """What another rank says, if rank 0 says something of `subject`."""
    return lambda own: {**own, subject: value} if subject in own else own


def refusal(action: Callable[[], None]) -> str:
    with pytest.raises(JobError) as caught:
        action()
    return str(caught.value)


def test_ranks_with_another_data_set_are_named() -> None:
    said = refusal(lambda: check_data_matches(RankOf(dict, other("the data set", "fingerprint 0")), data("abcd")))
    assert said == (
        "ranks differ in the data set: rank 0 on n0 has fingerprint abcdabcdabcd with a vocabulary of 257, rank 2 on "
        "n2 has fingerprint 0; data/small must be one data set on all hosts: prepare it once, and copy or share it"
    )
    check_data_matches(RankOf(dict, dict), data("abcd"))


@pytest.mark.parametrize(
    ("subject", "value", "remedy"),
    [
        ("the type of device", "cuda", "set train.device = 'cpu'"),
        ("how they round the optimizer's update", "0123", "use hosts of one kind"),
        ("how they round the learning rate", "0123", "use hosts of one kind"),
    ],
)
def test_ranks_that_would_drift_apart_are_named(subject: str, value: str, remedy: str) -> None:
    communicator = RankOf(other(subject, value))
    said = refusal(lambda: check_devices_match(communicator, CPU, Config()))
    assert re.search(rf"^ranks differ in {re.escape(subject)}: rank 0 on n0 has \S+, rank 1 on n1 has {value}; ", said)
    assert remedy in said


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"parallel": {"tensor": 2}}, "parallel.tensor"),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline"),
        ({"parallel": {"shard": 1, "data": 2}}, "parallel.data with parallel.shard"),
        ({"compression": {"codec": "own.py:Mine"}}, "a codec of your own"),
    ],
)
def test_what_else_is_equal_on_several_ranks_needs_one_instruction_set(settings: dict[str, Any], cause: str) -> None:
    communicator = RankOf(other("CPU capability", "AVX2"))
    said = refusal(lambda: check_devices_match(communicator, CPU, Config.model_validate(settings)))
    assert f"rank 1 on n1 has AVX2; {cause} has ranks compute the same by PyTorch: set ATEN_CPU_CAPABILITY" in said


def test_ranks_that_only_update_alike_may_have_other_instructions() -> None:
    for settings in ({}, {"parallel": {"shard": 3}}, {"local_steps": {"every": 4}}):
        check_devices_match(RankOf(other("CPU capability", "AVX2")), CPU, Config.model_validate(settings))


def test_evaluation_only_needs_one_type_of_device() -> None:
    check_devices_match(RankOf(other("CPU capability", "AVX2")), CPU)
    said = refusal(lambda: check_devices_match(RankOf(other("the type of device", "cuda")), CPU))
    assert "rank 0 on n0 has cpu, rank 1 on n1 has cuda" in said


def test_unlike_gpus_are_told_and_taken(caplog: pytest.LogCaptureFixture) -> None:
    agreement._report_unlike_gpus(RankOf(lambda _: "H100", lambda own: own), "A100")
    assert "ranks compute on unlike GPUs, 2 x A100, 1 x H100: all wait for the slowest" in caplog.text


def test_a_codec_of_one_s_own_is_one_file_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("class Mine: ...")
    settings = CompressionSection(codec=f"{file}:Mine")
    # sha256sum own.py
    digest = subprocess.run(["sha256sum", file], capture_output=True, text=True).stdout[:12]
    assert codec_digests(settings) == {str(file): digest}
    assert codec_digests(CompressionSection(codec="auto", candidates=f"none, {file}:Mine")) == {str(file): digest}
    assert codec_digests(CompressionSection(codec=f"{tmp_path}/none.py:Mine")) == {
        f"{tmp_path}/none.py": "no such file"
    }
    assert codec_digests(CompressionSection(codec="int4")) == {}
    config = Config(compression=settings)
    said = refusal(lambda: check_devices_match(RankOf(other(f"the codec {file}", "0123")), CPU, config))
    assert f"ranks differ in the codec {file}: " in said and "copy one file to all hosts" in said


def test_the_source_code_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(lambda: software.check_ranks_match(RankOf(other("the source code of hvdlm", "0123")), "d" * 64))
    assert "ranks differ in the source code of hvdlm: " in said and "one checkout" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_another_hvdlm_that_compares_less_is_named_too(rank: int) -> None:
    communicator = RankOf(dict)
    everyone = [{"hvdlm": "0.1.0", "more": "x"}, {"hvdlm": "0.1.0", "more": "x"}]
    del everyone[rank]["more"]
    communicator.all_gather_object = lambda _: everyone  # type: ignore[method-assign]
    own = {name: Shared("x", "install one version") for name in ("hvdlm", "more")}
    said = refusal(lambda: software.check_alike(communicator, own))
    assert said.startswith("ranks differ in more: rank 0 on n0 has ") and "nothing like it" in said


@pytest.mark.parametrize("freeze_variance_after", [0, 500])
def test_the_update_is_a_function_of_the_settings(freeze_variance_after: int) -> None:
    settings = OptimizerSection(freeze_variance_after=freeze_variance_after)
    digest = update_digest(CPU, settings)
    assert re.fullmatch("[0-9a-f]{12}", digest)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert update_digest(CPU, settings) == digest
    finally:
        torch.set_num_threads(threads)
    assert update_digest(CPU, settings.model_copy(update={"lr": 0.1})) != digest


def test_the_sample_holds_numbers_of_all_magnitudes() -> None:
    numbers = agreement._numbers((97, 101), 1).abs()
    exponents = numbers[numbers > 0].log2().floor()
    assert set(range(-78, 1)) <= set(exponents.int().flatten().tolist())


def test_the_rates_of_a_run() -> None:
    settings = OptimizerSection(warmup_steps=10)
    assert rates_digest(5000, settings) == rates_digest(5000, settings)
    assert rates_digest(5000, settings) != rates_digest(5000, settings.model_copy(update={"final_lr_ratio": 0.2}))


SCRIPT = """
import torch
from hvdlm.config import OptimizerSection
from hvdlm.training.agreement import update_digest
for algorithm in ("adamw", "adam", "sgd", "lion"):
    print(update_digest(torch.device("cpu"), OptimizerSection(algorithm=algorithm)))
print(update_digest(torch.device("cpu"), OptimizerSection(freeze_variance_after=9)))
numbers = torch.arange(1.0, 100_000.0)
print((numbers / 7).lerp(numbers / 3, 0.3).double().sum().item())
"""


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="PyTorch has one kind of loops here")
def test_updates_have_the_same_bits_on_every_kind_of_cpu(tmp_path: Path) -> None:
    """PyTorch's loops have not: the last line differs where the CPU multiplies and adds in one rounding."""

    def updates(**kind: str) -> list[str]:
        environment = {**os.environ, **kind}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    *own, torch_own = updates()
    *other, torch_other = updates(ATEN_CPU_CAPABILITY="default", **plain)
    assert own == other
    assert torch_own != torch_other
