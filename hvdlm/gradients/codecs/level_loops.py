"""The loops of integer.py for 2 bits, two levels a block, compiled by Numba for the CPU like integer_loops.py."""

from __future__ import annotations

import numpy as np

from hvdlm.gradients.codecs.block_loops import (
    TINY,
    TOO_LARGE,
    add_and_swap,
    bf16_bits,
    copy_padded,
    float_of_bf16,
    subtract,
)
from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK
from hvdlm.gradients.codecs.compiled import compiled

_SIGN = -0x80000000

# To find its levels, the magnitudes of a block are counted in this fraction of the largest one. So their sums are
# integers of at most 2**24, which do not depend on the order of additions and are float32 numbers.
UNITS = 2**16

# Log2 of the fraction of the way from the mean magnitude to the largest one where a number becomes a large one.
THRESHOLD_SHIFT = 3


@compiled()
def round_to_levels(
    block: int,
    spans: np.ndarray,
    gradients: np.ndarray,
    residual: np.ndarray,
    levels: np.ndarray,
    codes: np.ndarray,
) -> None:
    """`levels`: int16, the bits of two bfloat16 numbers for each block."""
    padded = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            values = residual[start : min(start + block, end)]
            largest = add_and_swap(gradients[start : min(start + block, end)], values)
            magnitude = np.int32(largest).view(np.float32)
            out = codes[first : first + (len(values) + 3) // 4]
            if magnitude >= TINY and largest < TOO_LARGE:
                units = np.float32(np.float32(UNITS) / magnitude)
                threshold, small, large = _find_levels(values, magnitude, units)
                if len(values) % 4:
                    copy_padded(values, padded)
                    _round_to_quarters(padded[: 4 * len(out)], units, threshold, small, large, out)
                    values[:] = padded[: len(values)]
                else:
                    _round_to_quarters(values, units, threshold, small, large, out)
            else:
                small = large = np.float32(0) if largest < TOO_LARGE else np.float32(np.nan)
                out[:] = 0
            levels[2 * number] = np.int16(np.float32(small).view(np.int32) >> np.int32(16))
            levels[2 * number + 1] = np.int16(np.float32(large).view(np.int32) >> np.int32(16))
            number += 1
            first += len(out)


@compiled()
def add_levels(
    block: int,
    spans: np.ndarray,
    from_zero: bool,
    levels: tuple[np.ndarray, ...],
    codes: tuple[np.ndarray, ...],
    target: np.ndarray,
) -> None:
    """As `add_integers`. `levels`: int16, as in `round_to_levels`."""
    padded = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            values = target[start : min(start + block, end)]
            nbytes = (len(values) + 3) // 4
            if from_zero:
                values[:] = 0
            for message in range(len(codes)):
                own, pair = codes[message][first : first + nbytes], levels[message]
                small = float_of_bf16(pair[2 * number])
                large = float_of_bf16(pair[2 * number + 1])
                if len(values) % 4:
                    copy_padded(values, padded)
                    _add_quarters(own, small, large, padded[: 4 * nbytes])
                    values[:] = padded[: len(values)]
                else:
                    _add_quarters(own, small, large, values)
            number += 1
            first += nbytes


@compiled()
def round_level_differences(
    block: int,
    spans: np.ndarray,
    numbers: np.ndarray,
    weights: np.ndarray,
    levels: np.ndarray,
    codes: np.ndarray,
) -> None:
    """As `round_to_levels`, of `numbers` - `weights`, which both stay as they are. `weights`: bits of bfloat16."""
    values = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            length = min(block, end - start)
            largest = subtract(numbers[start : start + length], weights[start : start + length], values)
            values[length:] = 0
            magnitude = np.int32(largest).view(np.float32)
            out = codes[first : first + (length + 3) // 4]
            if magnitude >= TINY and largest < TOO_LARGE:
                units = np.float32(np.float32(UNITS) / magnitude)
                threshold, small, large = _find_levels(values[:length], magnitude, units)
                _round_to_quarters(values[: 4 * len(out)], units, threshold, small, large, out)
            else:
                small = large = np.float32(0) if largest < TOO_LARGE else np.float32(np.nan)
                out[:] = 0
            levels[2 * number] = np.int16(np.float32(small).view(np.int32) >> np.int32(16))
            levels[2 * number + 1] = np.int16(np.float32(large).view(np.int32) >> np.int32(16))
            number += 1
            first += len(out)


@compiled()
def add_levels_to_weights(
    block: int, spans: np.ndarray, levels: np.ndarray, codes: np.ndarray, weights: np.ndarray
) -> None:
    """As `add_levels` of one message, in float32, of which `weights` keep the nearest bfloat16: their bits."""
    values = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            own = weights[start : min(start + block, end)]
            coded = codes[first : first + (len(own) + 3) // 4]
            small = float_of_bf16(levels[2 * number])
            large = float_of_bf16(levels[2 * number + 1])
            for index in range(len(own)):
                values[index] = float_of_bf16(own[index])
            _add_quarters(coded, small, large, values[: 4 * len(coded)])
            for index in range(len(own)):
                own[index] = bf16_bits(np.float32(values[index]).view(np.int32))
            number += 1
            first += len(coded)


@compiled()
def _find_levels(
    values: np.ndarray, largest: np.float32, units: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """From how many units on a number is a large one; the mean magnitude of the others, and of those, as bfloat16."""
    total = np.int32(0)
    for index in range(len(values)):
        total = np.int32(total + np.int32(np.float32(abs(values[index]) * units)))
    mean = total // np.int32(len(values))
    threshold = np.int32(mean + ((np.int32(UNITS) - mean) >> np.int32(THRESHOLD_SHIFT)))
    count = np.int32(0)
    large = np.int32(0)
    for index in range(len(values)):
        in_units = np.int32(np.float32(abs(values[index]) * units))
        is_large = in_units >= threshold
        count = np.int32(count + (np.int32(1) if is_large else np.int32(0)))
        large = np.int32(large + (in_units if is_large else np.int32(0)))
    unit = np.float32(largest / np.float32(UNITS))
    return np.float32(threshold), _mean(total - large, len(values) - count, unit), _mean(large, count, unit)


@compiled()
def _mean(total: int, count: int, unit: np.float32) -> np.float32:
    """`total` / `count` units, rounded to the nearest bfloat16, the even one of two."""
    mean = np.float32(np.float32(np.float32(total) / np.float32(max(count, 1))) * unit)
    bits = np.int32(mean.view(np.int32))
    bits = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1)))
    return np.int32(bits & np.int32(-0x10000)).view(np.float32)


@compiled()
def _round_to_quarters(
    values: np.ndarray, units: np.float32, threshold: np.float32, small: np.float32, large: np.float32, out: np.ndarray
) -> None:
    """Four quarters of a block, from the lowest two bits of `out` on: 1 for a large magnitude, 2 for less than zero."""
    length = len(out)
    first, second = values[:length], values[length : 2 * length]
    third, fourth = values[2 * length : 3 * length], values[3 * length :]
    for index in range(length):
        first[index], one = _round_to_level(first[index], units, threshold, small, large)
        second[index], two = _round_to_level(second[index], units, threshold, small, large)
        third[index], three = _round_to_level(third[index], units, threshold, small, large)
        fourth[index], four = _round_to_level(fourth[index], units, threshold, small, large)
        out[index] = np.uint8(np.int32(one | (two << np.int32(2)) | (three << np.int32(4)) | (four << np.int32(6))))


@compiled()
def _round_to_level(
    value: np.float32, units: np.float32, threshold: np.float32, small: np.float32, large: np.float32
) -> tuple[np.float32, np.int32]:
    """The error, and the code."""
    is_large = np.float32(abs(value) * units) >= threshold
    level = large if is_large else small
    bits = np.int32(np.float32(value).view(np.int32))
    signed = np.int32(np.float32(level).view(np.int32) | (bits & np.int32(_SIGN))).view(np.float32)
    code = ((bits >> np.int32(30)) & np.int32(2)) | (np.int32(1) if is_large else np.int32(0))
    return np.float32(value - signed), np.int32(code)


@compiled()
def _add_quarters(codes: np.ndarray, small: np.float32, large: np.float32, values: np.ndarray) -> None:
    length = len(codes)
    first, second = values[:length], values[length : 2 * length]
    third, fourth = values[2 * length : 3 * length], values[3 * length :]
    for index in range(length):
        four = np.int32(codes[index])
        first[index] += _level(four, small, large)
        second[index] += _level(four >> np.int32(2), small, large)
        third[index] += _level(four >> np.int32(4), small, large)
        fourth[index] += _level(four >> np.int32(6), small, large)


@compiled()
def _level(code: np.int32, small: np.float32, large: np.float32) -> np.float32:
    level = large if code & np.int32(1) else small
    return np.int32(np.float32(level).view(np.int32) ^ ((code & np.int32(2)) << np.int32(30))).view(np.float32)
