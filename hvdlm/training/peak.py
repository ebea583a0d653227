"""How fast a device can multiply matrices: what model FLOP utilisation is a share of.

The utilisation of a run is the arithmetic that its model needs (`hvdlm.model.size.flops_per_token`) over what its
devices could have done in the same time (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from hvdlm.config import Precision
from hvdlm.training.precision import DTYPES


class Peak(NamedTuple):
    """10^12 operations a second that a maker publishes: dense products summed in fp32; fp32 without TF32."""

    name: str  # part of what CUDA calls the chip
    bf16: float | None
    fp16: float | None
    fp32: float


# The first that fits counts. NVIDIA's data sheets, where they give the rate of sparse products halved: H100 (2024),
# H200 (2024), HGX B200 (2025), GH200 (2024), A100 (2021), L40S (2024), L4 (2023), A10 (2022), V100 (2020), T4 (2019);
# for GeForce the white papers of Ada (2022, table 2) and Ampere GA102 (2021, table 3).
PEAKS = (
    Peak("B200", 2250, 2250, 75),
    Peak("GH200", 989, 989, 67),
    Peak("H200 NVL", 835, 835, 60),
    Peak("H200", 989, 989, 67),
    Peak("H100 PCIe", 756, 756, 51),
    Peak("H100 NVL", 835, 835, 60),
    Peak("H100", 989, 989, 67),
    Peak("A100", 312, 312, 19.5),
    Peak("L40S", 362, 362, 91.6),
    Peak("L4", 121, 121, 30.3),
    Peak("A10", 125, 125, 31.2),
    Peak("V100-SXM2", None, 125, 15.7),
    Peak("V100-PCIE", None, 112, 14),
    Peak("T4", None, 65, 8.1),
    Peak("RTX 4090", 165.2, 165.2, 82.6),
    Peak("RTX 3090", 71, 71, 35.6),
)

# Words in the names of chips that are slower or faster than those without, and of parts of a chip
_OTHER_CHIPS = {"Ti", "SUPER", "D", "Laptop", "MIG"}

# Matrices are doubled until a product takes so long, in seconds; of each size so many products are timed, or fewer if
# they take longer than that together.
_LONG_ENOUGH = 0.004
_REPETITIONS = 20
_SECONDS = 0.1


def peak_flops(device: torch.device, precision: Precision, sharing: int = 1) -> float | None:
    """Operations a second of matrix products on this rank's part of its device, a GPU that `sharing` ranks share.

    Of a GPU what its maker publishes, None for one that is not in the list; of a CPU what a product of two matrices
    attains here and now on the threads that this process computes with. Takes about a tenth of a second on a CPU.
    """
    if device.type == "cuda":
        peak = published_peak(torch.cuda.get_device_name(device), precision)
        return None if peak is None else peak / sharing
    return measured_peak(DTYPES[precision])


def published_peak(chip: str, precision: Precision) -> float | None:
    """Operations a second of the chip that CUDA calls so."""
    words = chip.replace("-", " ").split()
    if not _OTHER_CHIPS.isdisjoint(words):
        return None
    for peak in PEAKS:
        parts = peak.name.replace("-", " ").split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            rate: float | None = getattr(peak, precision)
            return None if rate is None else rate * 1e12
    return None


def measured_peak(dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few products of square matrices on the CPU, large enough to count."""
    size, rate, seconds = 256, 0.0, 0.0
    while seconds < _LONG_ENOUGH and size <= 4096:
        seconds = _product_seconds(size, dtype)
        rate = max(rate, 2 * size**3 / seconds)
        size *= 2
    return rate


def _product_seconds(size: int, dtype: torch.dtype) -> float:
    """Of the fastest product: others may have had to share their core."""
    matrix = torch.ones(size, size, dtype=dtype)
    matrix @ matrix  # the first of its size prepares
    fastest = float("inf")
    begin = time.perf_counter()
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() - begin > _SECONDS:
            break
    return fastest
