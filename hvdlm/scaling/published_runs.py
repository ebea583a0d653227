"""Measurements that others have published of models in a layout, and what the forecast says of them.

Of each source the first run gives what a rank attains of its device's peak, as a user of `hvdlm predict --mfu` takes it
from a run of one rank or one host; the others are forecast by it. `benchmarks/published_runs.py` prints them all, and
their residuals are the interval of forecasts for which nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from hvdlm.config import ModelSection
from hvdlm.config.parallel import Schedule
from hvdlm.devices import device_named
from hvdlm.model.layout import Layout
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import flops_per_token
from hvdlm.scaling.cluster import BETWEEN_LATENCY, INSIDE_LATENCY, LINK_SHARE, Cluster, Link
from hvdlm.scaling.layout_forecast import LayoutScenario, Recomputation, forecast_layout
from hvdlm.scaling.rank_speed import OPTIMIZER_BYTES

_RANKS_PER_HOST = 8
_FITTED_SHARES = (0.01, 2.0)  # of the peak for bf16; that for fp8 is twice as high


@dataclass(frozen=True)
class Source:
    """A table of measurements by one group of people on one kind of machine."""

    name: str
    where: str
    device: str
    host_bits_per_second: float
    assumed: str = ""  # what it does not say


@dataclass(frozen=True)
class PublishedRun:
    """One row of a table."""

    source: Source
    name: str
    scenario: LayoutScenario
    tokens_per_second: float  # of one GPU


class Residual(NamedTuple):
    """A published run and its forecast."""

    run: PublishedRun
    share: float  # of the device's peak for bf16, that its source's first run gives
    predicted: float  # tokens/s of one GPU
    is_fitted: bool  # the first run of its source

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted / self.run.tokens_per_second - 1


def residuals() -> list[Residual]:
    """Of all published runs, in the order of their sources."""
    found = []
    for source in dict.fromkeys(run.source for run in RUNS):
        first, *others = [run for run in RUNS if run.source == source]
        share = _fitted_share(first)
        found += [Residual(run, share, _predicted(run, share), is_fitted=run is first) for run in (first, *others)]
    return found


@cache
def spread() -> float:
    """The root mean square of log(predicted / measured) of the runs that gave no share of the peak."""
    logs = [math.log(1 + each.error) for each in residuals() if not each.is_fitted]
    return math.sqrt(sum(each**2 for each in logs) / len(logs))


def cluster_of(source: Source, share: float) -> Cluster:
    """Hosts of 8 devices that attain this share of their peak."""
    device = device_named(source.device)
    peak = device.peak_flops("bf16")
    assert peak is not None
    return Cluster(
        share * peak,
        device.memory_bandwidth * 1e9,
        OPTIMIZER_BYTES["adamw"] / (device.memory_bandwidth * 1e9),
        _RANKS_PER_HOST,
        Link(LINK_SHARE * device.link * 1e9, INSIDE_LATENCY),
        Link(LINK_SHARE * source.host_bits_per_second / 8, BETWEEN_LATENCY),
    )


def _predicted(run: PublishedRun, share: float) -> float:
    step = forecast_layout(run.scenario, cluster_of(run.source, share))
    return run.scenario.tokens / step.seconds / run.scenario.layout.ranks


def _fitted_share(run: PublishedRun) -> float:
    """By bisection: a faster rank is never slower."""
    low, high = _FITTED_SHARES
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _predicted(run, middle) < run.tokens_per_second else (low, middle)
    return low


def _shape(preset: str, **changes: object) -> ModelSection:
    return ModelSection.model_validate({**PRESETS[preset], "preset": preset, **changes})


_FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md, commit 061f2c7"
_FOUNDRY_H100 = Source("llm-foundry, H100", _FOUNDRY, "h100", 3200e9, "the network, taken as 400 Gbit/s a GPU")
_FOUNDRY_A100 = Source("llm-foundry, A100", _FOUNDRY, "a100", 1600e9)
_TITAN = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md, commit 31a17bf, tables 1, 3, 4 and 5"
_TITAN_ASSUMED = "selective recomputation, taken as half a forward pass"
_TITAN_H100 = Source("torchtitan, H100", _TITAN, "h100", 3200e9, _TITAN_ASSUMED)
_TITAN_FLOAT8 = Source(
    *("torchtitan, H100, float8", _TITAN, "h100", 3200e9),
    f"{_TITAN_ASSUMED}; micro-batches, taken as one a stage; chunks of the interleaved schedule, taken as 2",
)
_TITAN_A100 = Source(
    *("torchtitan, A100", "pytorch/torchtitan docs/performance.md, commit 0413364", "a100", 1600e9),
    f"{_TITAN_ASSUMED}; the network, taken as 200 Gbit/s a GPU",
)
_MEGATRON = Source(
    "Megatron-LM, A100",
    "Narayanan et al. 2021, arXiv:2104.04473, table 1; micro-batches and interleaving: NVIDIA/Megatron-LM "
    "examples/sc21/run_table_1.sh, commit 79a3bb6",
    *("a100", 1600e9),
)
_LLAMA3 = Source(
    *("Llama 3 405B, H100", "Grattafiori et al. 2024, arXiv:2407.21783, table 4", "h100", 3200e9),
    "micro-batches, taken as one sequence; chunks of the interleaved schedule, taken as 8, a block each",
)


def _foundry(
    source: Source, size: str, ranks: int, batch: tuple[int, int], recomputed: Recomputation, speed: float
) -> PublishedRun:
    """`batch`: sequences of a step, and of a micro-batch."""
    layers, heads, width = {"7b": (32, 32, 4096), "13b": (40, 40, 5120), "30b": (48, 56, 7168), "70b": (80, 64, 8192)}[
        size
    ]
    shape = _shape("gpt2", layers=layers, heads=heads, width=width, context_length=2048)
    layout = Layout(zero=3, shard=ranks)
    scenario = LayoutScenario(shape, 50368, layout, *batch, recomputed=recomputed)
    return PublishedRun(source, f"MPT {size.upper()}", scenario, speed)


def _titan(
    source: Source,
    name: str,
    layout: Layout,
    batch: tuple[int, int],
    recomputed: Recomputation,
    speed: float,
) -> PublishedRun:
    shape, vocab_size = _TITAN_SHAPES[name]
    scenario = LayoutScenario(shape, vocab_size, layout, *batch, recomputed=recomputed)
    return PublishedRun(source, name, scenario, speed)


_LLAMA3_405B = _shape("llama-70b", layers=126, heads=128, width=16384, mlp_width=53248)
_TITAN_SHAPES = {
    "Llama 3 8B": (_shape("llama-8b"), 128256),
    "Llama 3 70B": (_shape("llama-70b"), 128256),
    "Llama 3 405B": (_LLAMA3_405B, 128256),
    # Touvron et al. 2023, arXiv:2307.09288
    "Llama 2 13B": (
        _shape("llama-8b", layers=40, heads=40, kv_heads=40, width=5120, mlp_width=13824, context_length=4096),
        32000,
    ),
    "Llama 2 70B": (_shape("llama-70b", context_length=4096), 32000),
}


def _megatron(
    name: str,
    heads: int,
    width: int,
    layers: int,
    tensor: int,
    pipeline: int,
    ranks: int,
    batch: tuple[int, int],
    teraflops: float,
    chunks: int = 1,
) -> PublishedRun:
    """`teraflops`: 10^12 FLOP/s of one GPU, in which recomputation counts (equation 3)."""
    shape = _shape("gpt2", layers=layers, heads=heads, width=width, context_length=2048)
    per_token = 96 * layers * width**2 * (1 + 2048 / (6 * width) + 51200 / (16 * layers * width))
    schedule: Schedule = "interleaved" if chunks > 1 else "1f1b"
    layout = Layout(
        data=ranks // (tensor * pipeline), tensor=tensor, pipeline=pipeline, schedule=schedule, chunks=chunks
    )
    scenario = LayoutScenario(
        *(shape, 51200, layout, *batch),
        recomputed="whole",
        plain_attention=True,
        gradient_bytes=2.0,
    )
    return PublishedRun(_MEGATRON, f"GPT {name}", scenario, teraflops * 1e12 / per_token)


def _llama3(ranks: int, batch: int, teraflops: float) -> PublishedRun:
    """`batch`: sequences of a data-parallel group; `teraflops`: 10^12 FLOP/s of one GPU."""
    groups = ranks // (8 * 16)
    layout = Layout(zero=1, shard=groups, tensor=8, pipeline=16, schedule="interleaved", chunks=8)
    scenario = LayoutScenario(_LLAMA3_405B, 128256, layout, groups * batch, 1)
    return PublishedRun(_LLAMA3, "Llama 3 405B", scenario, teraflops * 1e12 / flops_per_token(_LLAMA3_405B, 128256))


_ZERO_8, _ZERO_64, _ZERO_128 = (Layout(zero=3, shard=ranks) for ranks in (8, 64, 128))
_ZERO_TENSOR = Layout(zero=3, shard=32, tensor=8)
_ALL_THREE = Layout(zero=3, shard=8, tensor=8, pipeline=8)
_INTERLEAVED = replace(_ALL_THREE, schedule="interleaved", chunks=2)

RUNS: Sequence[PublishedRun] = (
    _foundry(_FOUNDRY_H100, "7b", 8, (48, 6), "none", 10643),
    _foundry(_FOUNDRY_H100, "13b", 8, (16, 2), "none", 4792),
    _foundry(_FOUNDRY_H100, "13b", 16, (32, 2), "none", 4767),
    _foundry(_FOUNDRY_H100, "13b", 32, (64, 2), "none", 4811),
    _foundry(_FOUNDRY_H100, "13b", 64, (128, 2), "none", 4800),
    _foundry(_FOUNDRY_H100, "30b", 8, (504, 3), "block", 2002),
    _foundry(_FOUNDRY_H100, "30b", 16, (480, 10), "block", 2263),
    _foundry(_FOUNDRY_H100, "30b", 32, (1344, 14), "block", 2308),
    _foundry(_FOUNDRY_H100, "70b", 32, (1024, 2), "block", 882),
    _foundry(_FOUNDRY_H100, "70b", 64, (2048, 8), "block", 1039),
    _foundry(_FOUNDRY_A100, "7b", 8, (96, 6), "none", 4641),
    _foundry(_FOUNDRY_A100, "13b", 8, (48, 2), "none", 2262),
    _foundry(_FOUNDRY_A100, "30b", 8, (504, 3), "block", 916),
    _foundry(_FOUNDRY_A100, "70b", 32, (1024, 2), "block", 373),
    _foundry(_FOUNDRY_A100, "70b", 64, (2048, 8), "block", 410),
    _titan(_TITAN_H100, "Llama 3 8B", _ZERO_8, (16, 2), "half", 6667),
    _titan(_TITAN_H100, "Llama 3 8B", _ZERO_128, (256, 2), "half", 6514),
    _titan(_TITAN_FLOAT8, "Llama 3 8B", _ZERO_8, (16, 2), "half", 8532),
    _titan(_TITAN_FLOAT8, "Llama 3 8B", _ZERO_128, (256, 2), "half", 8380),
    _titan(_TITAN_FLOAT8, "Llama 3 70B", _ZERO_TENSOR, (512, 16), "block", 829),
    _titan(_TITAN_FLOAT8, "Llama 3 405B", _ALL_THREE, (256, 4), "block", 100),
    _titan(_TITAN_FLOAT8, "Llama 3 405B", _INTERLEAVED, (256, 4), "block", 128),
    _titan(_TITAN_A100, "Llama 2 13B", _ZERO_64, (128, 2), "none", 2162),
    _titan(_TITAN_A100, "Llama 2 70B", _ZERO_64, (128, 2), "block", 353),
    _titan(_TITAN_A100, "Llama 3 8B", _ZERO_64, (64, 1), "half", 2973),
    _titan(_TITAN_A100, "Llama 3 70B", _ZERO_64, (64, 1), "block", 331),
    _megatron("1.7B", 24, 2304, 24, 1, 1, 32, (512, 16), 137),
    _megatron("3.6B", 32, 3072, 30, 2, 1, 64, (512, 16), 138),
    _megatron("7.5B", 32, 4096, 36, 4, 1, 128, (512, 16), 142),
    _megatron("18B", 48, 6144, 40, 8, 1, 256, (1024, 8), 135),
    _megatron("39B", 64, 8192, 48, 8, 2, 512, (1536, 4), 138),
    _megatron("76B", 80, 10240, 60, 8, 4, 1024, (1792, 2), 140, 3),
    _megatron("145B", 96, 12288, 80, 8, 8, 1536, (2304, 2), 148, 2),
    _megatron("310B", 128, 16384, 96, 8, 16, 1920, (2160, 1), 155, 2),
    _megatron("530B", 128, 20480, 105, 8, 35, 2520, (2520, 1), 163, 3),
    _megatron("1T", 160, 25600, 128, 8, 64, 3072, (3072, 1), 163),
    _llama3(8192, 32, 430),
    _llama3(16384, 16, 400),
)
