"""The loops of integer.py for 8 and 4 bits, compiled by Numba for the CPU: one pass over memory, a block at a time in
the cache.

The inner loops have no branches, and take the numbers that share a byte in one turn: so LLVM uses vector instructions
for all of them, and a number takes half of the time that it takes where one loop completes the bytes of another
(benchmarks/LOG.md). A block whose length is no multiple of the numbers in a byte is rounded in a copy, with zeros
behind it. Loops over blocks repeat what they do with one: in functions that all of them call, it took 25 to 100% longer
(benchmarks/LOG.md).
"""

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

# Added to a float32 of a magnitude below 2**22, it leaves the nearest integer, the even one of two, in the last bits.
ROUNDING = np.float32(1.5 * 2**23)


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
            largest = add_and_swap(gradients[start : min(start + block, end)], values)
            magnitude = np.int32(largest).view(np.float32)
            out = integers[first : first + (len(values) * bits + 7) // 8]
            if magnitude >= TINY and largest < TOO_LARGE:
                scale, inverse = np.float32(magnitude / top), np.float32(top / magnitude)
                if bits == 8:
                    _round_to_bytes(values, scale, inverse, out)
                elif len(values) % 2:
                    copy_padded(values, padded)
                    _round_to_nibbles(padded[: len(out)], padded[len(out) : 2 * len(out)], scale, inverse, out)
                    values[:] = padded[: len(values)]
                else:
                    _round_to_nibbles(values[: len(out)], values[len(out) :], scale, inverse, out)
            else:
                scale = np.float32(0) if largest < TOO_LARGE else np.float32(np.nan)
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
                    copy_padded(values, padded)
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
            largest = subtract(numbers[start : start + length], weights[start : start + length], values)
            values[length:] = 0
            magnitude = np.int32(largest).view(np.float32)
            out = integers[first : first + (length * bits + 7) // 8]
            if magnitude >= TINY and largest < TOO_LARGE:
                scale, inverse = np.float32(magnitude / top), np.float32(top / magnitude)
                if bits == 8:
                    _round_to_bytes(values, scale, inverse, out)
                else:
                    _round_to_nibbles(values[: len(out)], values[len(out) :], scale, inverse, out)
            else:
                scale = np.float32(0) if largest < TOO_LARGE else np.float32(np.nan)
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
                values[index] = float_of_bf16(own[index])
            if bits == 8:
                _add_bytes(codes, scales[number], values)
            else:
                _add_nibbles(codes, scales[number], values[: len(codes)], values[len(codes) :])
            for index in range(len(own)):
                own[index] = bf16_bits(np.float32(values[index]).view(np.int32))
            number += 1
            first += len(codes)


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
