"""What loops over blocks of numbers do with one block, and with one number: compiled by Numba for the CPU."""

from __future__ import annotations

import numpy as np

from hvdlm.gradients.codecs.compiled import compiled

MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign

TOO_LARGE = 0x7F000000  # bits of 2**127, beyond which rounding might overflow; infinity and NaN stand above

# A block without a larger magnitude stays in the residual: the inverse of its scale might not be finite in float32.
TINY = np.float32(2.0**-100)


@compiled()
def add_and_swap(gradients: np.ndarray, residual: np.ndarray) -> np.int32:
    """Adds `gradients` to `residual`, whose old numbers they then hold; returns the bits of the largest magnitude."""
    largest = np.int32(0)
    for index in range(len(residual)):
        intended = np.float32(gradients[index] + residual[index])
        gradients[index] = residual[index]
        residual[index] = intended
        # Over integers, whose maximum does not depend on the order of comparison: the loop is vectorised
        largest = max(largest, np.int32(intended.view(np.int32) & MAGNITUDE))
    return largest


@compiled()
def subtract(numbers: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.int32:
    """Fills `values` by the differences; returns the bits of the largest magnitude."""
    largest = np.int32(0)
    for index in range(len(numbers)):
        difference = np.float32(numbers[index] - float_of_bf16(weights[index]))
        values[index] = difference
        largest = max(largest, np.int32(difference.view(np.int32) & MAGNITUDE))
    return largest


@compiled()
def copy_padded(values: np.ndarray, padded: np.ndarray) -> None:
    padded[: len(values)] = values
    padded[len(values) :] = 0


@compiled()
def float_of_bf16(bits: int) -> np.float32:
    """Of the bits of a bfloat16, an integer of at least 16 bits."""
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)


@compiled()
def bf16_bits(bits: np.int32) -> np.uint16:
    """The nearest bfloat16 of a float32's bits, ties to even."""
    rounded = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    is_nan = (bits & np.int32(MAGNITUDE)) > np.int32(0x7F800000)
    return np.uint16(np.int32(0x7FC0) if is_nan else rounded)
