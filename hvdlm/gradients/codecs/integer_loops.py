"""The loops of integer.py, compiled by Numba for the CPU: one pass over memory, a block at a time in the cache.

All that these loops call is in this file, as Numba's cache notices changes of one file only. The inner loops have no
branches, and take the numbers that share a byte in one turn: so LLVM uses vector instructions for all of them, and a
number takes half of the time that it takes where one loop completes the bytes of another (benchmarks/LOG.md). A block
whose length is no multiple of the numbers in a byte is rounded in a copy, with zeros behind it. Loops over blocks
repeat what they do with one: in functions that all of them call, it took 25 to 100% longer (benchmarks/LOG.md).
"""

from __future__ import annotations

import numpy as np

from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK
from hvdlm.gradients.codecs.compiled import compiled

MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign
_SIGN = -0x80000000

_TOO_LARGE = 0x7F000000  # bits of 2**127, beyond which rounding might overflow; infinity and NaN stand above

# A block without a larger magnitude stays in the residual: the inverse of its scale might not be finite in float32.
TINY = np.float32(2.0**-100)

# Added to a float32 of a magnitude below 2**22, it leaves the nearest integer, the even one of two, in the last bits.
ROUNDING = np.float32(1.5 * 2**23)

# To find its levels, the magnitudes of a block are counted in this fraction of the largest one. So their sums are
# integers of at most 2**24, which do not depend on the order of additions and are float32 numbers.
UNITS = 2**16

# Log2 of the fraction of the way from the mean magnitude to the largest one where a number becomes a large one.
THRESHOLD_SHIFT = 3


@compiled()
def round_to_integers(
    block: int,
    spans: np.ndarray,
    bits: int,
    gradients: np.ndarray,
    residual: np.ndarray,
    scales: np.ndarray,
    integers: np.ndarray,
) -> None:
    top = np.float32(2 ** (bits - 1) - 1)
    padded = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            values = residual[start : min(start + block, end)]
            largest = _add_and_swap(gradients[start : min(start + block, end)], values)
            magnitude = np.int32(largest).view(np.float32)
            out = integers[first : first + (len(values) * bits + 7) // 8]
            if magnitude >= TINY and largest < _TOO_LARGE:
                scale, inverse = np.float32(magnitude / top), np.float32(top / magnitude)
                if bits == 8:
                    _round_to_bytes(values, scale, inverse, out)
                elif len(values) % 2:
                    _copy_padded(values, padded)
                    _round_to_nibbles(padded[: len(out)], padded[len(out) : 2 * len(out)], scale, inverse, out)
                    values[:] = padded[: len(values)]
                else:
                    _round_to_nibbles(values[: len(out)], values[len(out) :], scale, inverse, out)
            else:
                scale = np.float32(0) if largest < _TOO_LARGE else np.float32(np.nan)
                out[:] = 0 if bits == 8 else 136
            scales[number] = scale
            number += 1
            first += len(out)


@compiled()
def add_integers(
    block: int,
    spans: np.ndarray,
    bits: int,
    from_zero: bool,
    scales: tuple[np.ndarray, ...],
    integers: tuple[np.ndarray, ...],
    target: np.ndarray,
) -> None:
    """`scales`, `integers`: of each message. `from_zero`: what was in the blocks is overwritten."""
    padded = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            values = target[start : min(start + block, end)]
            nbytes = (len(values) * bits + 7) // 8
            if from_zero:
                values[:] = 0
            for message in range(len(integers)):
                codes, scale = integers[message][first : first + nbytes], scales[message][number]
                if bits == 8:
                    _add_bytes(codes, scale, values)
                elif len(values) % 2:
                    _copy_padded(values, padded)
                    _add_nibbles(codes, scale, padded[:nbytes], padded[nbytes : 2 * nbytes])
                    values[:] = padded[: len(values)]
                else:
                    _add_nibbles(codes, scale, values[:nbytes], values[nbytes:])
            number += 1
            first += nbytes


@compiled()
def round_differences(
    block: int,
    spans: np.ndarray,
    bits: int,
    numbers: np.ndarray,
    weights: np.ndarray,
    scales: np.ndarray,
    integers: np.ndarray,
) -> None:
    """As `round_to_integers`, of `numbers` - `weights`, which both stay as they are. `weights`: bits of bfloat16."""
    values = np.empty(LONGEST_BLOCK, np.float32)
    top = np.float32(2 ** (bits - 1) - 1)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            length = min(block, end - start)
            largest = _subtract(numbers[start : start + length], weights[start : start + length], values)
            values[length:] = 0
            magnitude = np.int32(largest).view(np.float32)
            out = integers[first : first + (length * bits + 7) // 8]
            if magnitude >= TINY and largest < _TOO_LARGE:
                scale, inverse = np.float32(magnitude / top), np.float32(top / magnitude)
                if bits == 8:
                    _round_to_bytes(values, scale, inverse, out)
                else:
                    _round_to_nibbles(values[: len(out)], values[len(out) :], scale, inverse, out)
            else:
                scale = np.float32(0) if largest < _TOO_LARGE else np.float32(np.nan)
                out[:] = 0 if bits == 8 else 136
            scales[number] = scale
            number += 1
            first += len(out)


@compiled()
def add_to_weights(
    block: int, spans: np.ndarray, bits: int, scales: np.ndarray, integers: np.ndarray, weights: np.ndarray
) -> None:
    """As `add_integers` of one message, in float32, of which `weights` keep the nearest bfloat16: their bits."""
    values = np.empty(LONGEST_BLOCK, np.float32)
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            own = weights[start : min(start + block, end)]
            codes = integers[first : first + (len(own) * bits + 7) // 8]
            for index in range(len(own)):
                values[index] = _float_of_bf16(own[index])
            if bits == 8:
                _add_bytes(codes, scales[number], values)
            else:
                _add_nibbles(codes, scales[number], values[: len(codes)], values[len(codes) :])
            for index in range(len(own)):
                own[index] = _bf16_bits(np.float32(values[index]).view(np.int32))
            number += 1
            first += len(codes)


@compiled()
def _subtract(numbers: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.int32:
    """Fills `values` by the differences; returns the bits of the largest magnitude."""
    largest = np.int32(0)
    for index in range(len(numbers)):
        difference = np.float32(numbers[index] - _float_of_bf16(weights[index]))
        values[index] = difference
        largest = max(largest, np.int32(difference.view(np.int32) & MAGNITUDE))
    return largest


@compiled()
def _float_of_bf16(bits: np.uint16) -> np.float32:
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)


@compiled()
def _bf16_bits(bits: np.int32) -> np.uint16:
    """The nearest bfloat16 of a float32's bits, ties to even."""
    rounded = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    is_nan = (bits & np.int32(MAGNITUDE)) > np.int32(0x7F800000)
    return np.uint16(np.int32(0x7FC0) if is_nan else rounded)


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
            largest = _add_and_swap(gradients[start : min(start + block, end)], values)
            magnitude = np.int32(largest).view(np.float32)
            out = codes[first : first + (len(values) + 3) // 4]
            if magnitude >= TINY and largest < _TOO_LARGE:
                units = np.float32(np.float32(UNITS) / magnitude)
                threshold, small, large = _find_levels(values, magnitude, units)
                if len(values) % 4:
                    _copy_padded(values, padded)
                    _round_to_quarters(padded[: 4 * len(out)], units, threshold, small, large, out)
                    values[:] = padded[: len(values)]
                else:
                    _round_to_quarters(values, units, threshold, small, large, out)
            else:
                small = large = np.float32(0) if largest < _TOO_LARGE else np.float32(np.nan)
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
                small = np.int32(np.int32(pair[2 * number]) << np.int32(16)).view(np.float32)
                large = np.int32(np.int32(pair[2 * number + 1]) << np.int32(16)).view(np.float32)
                if len(values) % 4:
                    _copy_padded(values, padded)
                    _add_quarters(own, small, large, padded[: 4 * nbytes])
                    values[:] = padded[: len(values)]
                else:
                    _add_quarters(own, small, large, values)
            number += 1
            first += nbytes


@compiled()
def _add_and_swap(gradients: np.ndarray, residual: np.ndarray) -> np.int32:
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
def _copy_padded(values: np.ndarray, padded: np.ndarray) -> None:
    padded[: len(values)] = values
    padded[len(values) :] = 0


@compiled()
def _round_to_bytes(values: np.ndarray, scale: np.float32, inverse: np.float32, out: np.ndarray) -> None:
    for index in range(len(out)):
        value = values[index]
        lifted = np.float32(np.float32(value * inverse) + ROUNDING)
        values[index] = np.float32(value - np.float32(np.float32(lifted - ROUNDING) * scale))
        out[index] = np.uint8(lifted.view(np.int32))


@compiled()
def _round_to_nibbles(
    low: np.ndarray, high: np.ndarray, scale: np.float32, inverse: np.float32, out: np.ndarray
) -> None:
    """The first half of a block in the low four bits of `out`, the second half in the high ones; 8 is zero."""
    for index in range(len(out)):
        one, other = low[index], high[index]
        lifted_one = np.float32(np.float32(one * inverse) + ROUNDING)
        lifted_other = np.float32(np.float32(other * inverse) + ROUNDING)
        low[index] = np.float32(one - np.float32(np.float32(lifted_one - ROUNDING) * scale))
        high[index] = np.float32(other - np.float32(np.float32(lifted_other - ROUNDING) * scale))
        both = lifted_one.view(np.int32) + (lifted_other.view(np.int32) << np.int32(4))
        out[index] = np.uint8(np.int32(both + np.int32(136)))


@compiled()
def _add_bytes(codes: np.ndarray, scale: np.float32, values: np.ndarray) -> None:
    for index in range(len(codes)):
        values[index] += np.float32(np.int8(codes[index])) * scale


@compiled()
def _add_nibbles(codes: np.ndarray, scale: np.float32, low: np.ndarray, high: np.ndarray) -> None:
    for index in range(len(codes)):
        low[index] += np.float32(np.float32(np.int32(codes[index] & np.uint8(15)) - np.int32(8)) * scale)
        high[index] += np.float32(np.float32(np.int32(codes[index] >> np.uint8(4)) - np.int32(8)) * scale)


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
