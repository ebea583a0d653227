"""Model FLOP utilisation of one rank, as benchmarks/one_rank.py measures it, and what codecs take."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launcher import run
from torch import nn

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import CommSection, CompressionSection
from hvdlm.gradients.codecs.registry import CODECS
from hvdlm.gradients.sync import GradientSync
from hvdlm.training.hardware import choose_device

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("model", "system"), [("gpt2", "hvdlm bf16"), ("llama-1b", "hvdlm bf16"), ("gpt2", "hvdlm bf16 compiled")]
)
def test_one_rank(model: str, system: str, text_data: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    """That it can be measured, and what it is; no bound, for which a machine would have to be known."""
    words = [sys.executable, str(ROOT / "benchmarks" / "one_rank.py"), "--data", str(text_data)]
    words += ["--output", str(tmp_path), "--rounds", "2", "--steps", "5"]
    result = run([*words, "--models", model, "--systems", system], deadline=220)
    assert result.status == 0, result.output
    (row,) = json.loads((tmp_path / "one_rank.json").read_text())[model]["rows"]
    share = row["utilisation"]
    utilisation = "peak not known" if share is None else f"utilisation {share:.1%}"
    memory = f"{row['memory_bytes'] / 1e9:.1f} GB, predicted {row['predicted_bytes'] / 1e9:.1f}"
    measured(f"{row['tokens_per_second']:,.0f} tokens/s, {utilisation}, {memory}")
    assert row["tokens_per_second"] > 0
    assert share is None or 0 < share < 1


@pytest.mark.parametrize("codec", list(CODECS))
def test_codec(codec: str, measured: Callable[[str], None]) -> None:
    """What encoding and decoding a matrix of gradients takes, nothing being sent, beside one copy of it."""
    gpu = choose_device("cuda", SoloCommunicator())
    comm, compression = CommSection(bucket_mb=1000), CompressionSection(codec=codec)
    sync = GradientSync(nn.Linear(4096, 4096, bias=False).to(gpu), SoloCommunicator(), comm, compression)
    (bucket,), (own,), (channel,) = sync.buckets, sync.codecs, sync.channels
    drawn, copied = torch.randn_like(bucket.buffer), torch.empty_like(bucket.buffer)

    def encode_and_decode() -> None:
        bucket.buffer.copy_(drawn)
        own.reduce_(bucket.buffer, channel.exchange, 10_000)

    seconds, copy_seconds = seconds_of(encode_and_decode), seconds_of(lambda: copied.copy_(drawn))
    seconds -= copy_seconds
    sync.close()
    measured(f"{seconds / drawn.numel() * 1e12:.1f} ps a number, {seconds / copy_seconds:.1f} copies")


def seconds_of(action: Callable[[], object]) -> float:
    """The median of 20, by the GPU's clock."""
    for _ in range(3):
        action()
    seconds = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
