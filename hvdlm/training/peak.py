"""How fast a device can multiply matrices: what model FLOP utilisation is a share of.

The utilisation of a run is the arithmetic that its model needs (`hvdlm.model.size.flops_per_token`) over what its
devices could have done in the same time (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import time

import torch

from hvdlm.config import Precision
from hvdlm.devices import device_of_chip
from hvdlm.training.precision import DTYPES

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
    """Operations a second of the chip that CUDA calls so; None for one that is not in the list."""
    device = device_of_chip(chip)
    return device and device.peak_flops(precision)


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
