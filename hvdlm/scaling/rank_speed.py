"""How fast one rank computes, as a user of `hvdlm predict` says: by its device, or by its measured tokens/s."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvdlm.config import Algorithm, Config, Precision
from hvdlm.devices import Device, device_named
from hvdlm.errors import HvdlmError
from hvdlm.model.size import flops_per_token
from hvdlm.scaling.layout_forecast import moved_bytes_per_token

# Bytes of a parameter that an optimizer's step moves: gradient and master weight are read, the latter is written, and
# each moment is read and written
OPTIMIZER_BYTES: dict[Algorithm, int] = {"adamw": 28, "adam": 28, "dion": 28, "muon": 28, "sgd": 20, "lion": 20}

# Of a step of one rank on a CPU, what its matrix products take: 61% with AVX512-BF16 (benchmarks/results/one_rank.md)
CPU_PRODUCTS = 0.6


@dataclass(frozen=True)
class RankSpeed:
    """What one rank computes while it waits for nobody."""

    overall_flops: float  # FLOP/s of the model's arithmetic
    product_flops: float  # of its matrix products alone
    memory_bandwidth: float  # bytes/s, for all between the products; infinite where that is not known apart
    optimizer_seconds: float  # of an optimizer's step, for a parameter; 0 where `overall_flops` includes it
    device: Device | None
    peak: float | None  # FLOP/s of the device

    def describe(self, precision: Precision) -> str:
        """In a sentence."""
        of_peak = f" of its {self.peak / 1e12:,.0f}" if self.peak else ""
        return f"One rank computes {self.overall_flops / 1e12:,.4g}{of_peak} TFLOP/s in {precision}."


def rank_speed(
    config: Config, vocab_size: int, device: str | None, mfu: float | None, tokens_per_second: float | None
) -> RankSpeed | None:
    """The speed of a rank that attains `mfu` of its device's peak, or so many tokens/s, alone and without activation
    checkpointing; None where nothing is said.

    Raises HvdlmError for what does not fit together, and for more than the device's memory can feed.
    """
    for option, value in (("--mfu", mfu), ("--tokens-per-second", tokens_per_second)):
        if value is not None and value <= 0:
            raise HvdlmError(f"{option} {value:g}: give a number above 0")
    if mfu is not None and (mfu > 1 or device is None):
        raise HvdlmError(f"--mfu {mfu:g} is a share of a device's peak, at most 1: give --device, too")
    if mfu is not None and tokens_per_second is not None:
        raise HvdlmError("--mfu and --tokens-per-second both say how fast a rank is: give one of them")
    if device is None and tokens_per_second is None:
        return None
    per_token = flops_per_token(config.model, vocab_size)
    if device is None:
        assert tokens_per_second is not None
        flops = tokens_per_second * per_token
        if config.train.device != "cpu":
            return RankSpeed(flops, flops, math.inf, 0.0, None, None)
        moved = moved_bytes_per_token(config.model, config.train.precision)
        bandwidth = moved * tokens_per_second / (1 - CPU_PRODUCTS)
        return RankSpeed(flops, flops / CPU_PRODUCTS, bandwidth, 0.0, None, None)
    chip = device_named(device)
    peak = chip.peak_flops(config.train.precision)
    if peak is None:
        raise HvdlmError(f"--device {device} has no products in {config.train.precision}: set train.precision = 'fp16'")
    if mfu is None and tokens_per_second is None:
        raise HvdlmError(f"--device {device}: give --mfu, the share of its peak that one rank attains, such as 0.4")
    overall = mfu * peak if mfu is not None else (tokens_per_second or 0.0) * per_token
    bandwidth = chip.memory_bandwidth * 1e9
    moving = moved_bytes_per_token(config.model, config.train.precision) / bandwidth
    products = per_token / overall - moving  # seconds of a token
    if products <= per_token / peak:
        most = per_token / (per_token / peak + moving) / peak
        raise HvdlmError(
            f"a rank on {device} cannot attain {overall / peak:.0%} of its peak in {config.train.precision} with this "
            f"model: its memory allows {most:.0%}"
        )
    optimizer = OPTIMIZER_BYTES[config.optimizer.algorithm] / bandwidth
    return RankSpeed(overall, per_token / products, bandwidth, optimizer, chip, peak)
