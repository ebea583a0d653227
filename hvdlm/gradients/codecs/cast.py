"""Codecs `fp16` and `bf16`: half as many bits a number.

On our ring each segment carries a scale of its own, so no finite gradient overflows or vanishes beside its neighbours,
and sums are float32. Where there is no ring the engine sums numbers of that type, scaled so that no sum overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvdlm.comm.communicator import ReduceOp
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.halves import add_errors, compile_for_cpu, largest_of, narrow, power_of_two, widen
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.feedback import Residual

_SCALE_BYTES = 4

# The largest magnitude of a segment becomes this, whose half-precision neighbours fp16 and bf16 both have: far from
# fp16's largest number, 65504, and as far as can be from its smallest normal one, 2**-14.
_TOP = 2.0**15


class ScaledCast:
    """A segment as a float32 scale, a power of two, then its numbers in a smaller type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def nbytes(self, elements: int) -> int:
        return _SCALE_BYTES + (elements * self._dtype.itemsize + 3) // 4 * 4  # messages begin at multiples of 4

    def encode(self, values: Tensor, message: Tensor, errors: Tensor | None = None) -> None:
        largest = add_errors(values, errors)
        scale = power_of_two(_TOP, largest)
        message[:_SCALE_BYTES].view(torch.float32).fill_(scale)
        narrow(values, scale, self._numbers(message, len(values)), errors)

    def decode(self, message: Tensor, values: Tensor) -> None:
        scale = float(message[:_SCALE_BYTES].view(torch.float32))
        widen(self._numbers(message, len(values)), 1 / scale if scale else math.nan, values)  # no message has scale 0

    def _numbers(self, message: Tensor, length: int) -> Tensor:
        return message[_SCALE_BYTES:].view(self._dtype)[:length]


class Cast(Codec):
    """Gradients as numbers of a smaller type; what rounding took is added to the next step's, if so configured."""

    def __init__(self, dtype: torch.dtype, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self._dtype = dtype
        self._encoding = ScaledCast(dtype)
        self._residual = Residual(bucket, settings.error_feedback)
        if bucket.buffer.is_cpu:
            compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if exchange.has_ring:
            exchange.all_reduce_(gradients, self._encoding, self._residual.values)
            return
        self._residual.carry_into_(gradients)
        largest = largest_of(gradients).reshape(1)
        exchange.all_reduce_(largest, op=ReduceOp.MAX)
        scale = power_of_two(_TOP / exchange.size, float(largest))
        numbers = (gradients * scale).to(self._dtype)
        self._residual.keep(gradients, lambda: numbers.float() * (1 / scale))
        exchange.all_reduce_(numbers)
        gradients.copy_(numbers).mul_(1 / scale)

    def state(self) -> dict[str, Tensor]:
        return self._residual.state()
