"""Codec `powersgd`: of each matrix of gradients its product with a few vectors travels (Vogels et al., NeurIPS 2019).

For a matrix M_i (m x n) of rank i and `compression.rank` vectors in Q (n x r), equal on all ranks, algorithm 1:

    P = orthonormalised sum over i of M_i Q         first message
    Q_i = M_i^T P,  Q = sum over i of Q_i           second message
    delivered: P Q^T

which is r (m + n) numbers instead of m n. Q is where the next step starts (warm start): a step of power iteration on
the sum of gradients, whose largest singular vectors change slowly. All matrices of a bucket travel together; biases,
normalisation weights and whatever would not get smaller go as they are, with the first message.

Error feedback (algorithm 2) with what each rank has kept back itself: M_i, its gradient and old residual, leaves the
residual M_i - P Q_i^T = (1 - P P^T) M_i. Over all ranks residuals + delivered = sum M_i - P (sum Q_i)^T + P Q^T = sum
M_i, whatever P is: nothing is lost, but for the rounding of float32. (On one rank P Q^T + (M - P Q^T) too is M only up
to its last bits: a difference of numbers that are not near one another is rounded.)
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blocks import is_large_matrix
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.low_rank import (
    Matrices,
    compile_for_cpu,
    deliver,
    multiply,
    multiply_transposed,
    orthonormalise,
    point_along,
)
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.feedback import reduce_whole_


class PowerSGD(Codec):
    """Sends products with `compression.rank` vectors on either side of large matrices; the rest as it is."""

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        buffer = bucket.buffer
        compressed, dense, places = _sort(bucket, settings.rank)
        self._matrices = Matrices(settings.rank, torch.tensor(places, dtype=torch.int64).reshape(-1, 5))
        self._dense = dense.to(buffer.device)  # where in the buffer numbers lie that travel as they are
        self._residual = torch.zeros_like(buffer)
        self._first_message = buffer.new_empty(len(dense) + self._matrices.lefts())
        self._lefts = self._first_message[len(dense) :]
        self._own_rights = buffer.new_empty(self._matrices.rights())
        self._rights = torch.empty_like(self._own_rights)
        self._basis = torch.empty_like(self._own_rights)
        self._basis_of = dict(zip(compressed, self._matrices.cut_rights(self._basis), strict=True))
        for name, basis in self._basis_of.items():
            # of its own for each matrix, but the same on every rank, and from run to run
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            basis.copy_(torch.randn(basis.shape, generator=generator) / math.sqrt(basis.shape[1]))
        if buffer.is_cpu:
            compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if step < self.settings.warmup_steps:
            reduce_whole_(gradients, self._residual, exchange)
            return
        if not self.settings.error_feedback:
            self._residual.zero_()
        matrices, residual = self._matrices, self._residual
        dense = self._first_message[: len(self._dense)]
        torch.add(gradients[self._dense], residual[self._dense], out=dense)
        multiply(matrices, gradients, residual, self._basis, self._lefts)
        exchange.all_reduce_(self._first_message)
        is_finite = bool(self._first_message.isfinite().all())
        if is_finite and len(self._lefts):
            orthonormalise(matrices, self._lefts)
            multiply_transposed(matrices, gradients, residual, self._lefts, self._own_rights)
            self._rights.copy_(self._own_rights)
            exchange.all_reduce_(self._rights)
            is_finite = bool(self._rights.isfinite().all())
        if not is_finite:
            gradients.fill_(math.nan)  # as all ranks have seen: none owes anything of a step that is not used
            return
        deliver(matrices, gradients, residual, self._lefts, self._own_rights, self._rights)
        gradients[self._dense] = dense
        residual[self._dense] = 0
        for basis, rights in zip(self._basis_of.values(), matrices.cut_rights(self._rights), strict=True):
            point_along(basis, rights)

    def state(self) -> dict[str, Tensor]:
        return {"residual": self._residual} if self.settings.error_feedback else {}

    def further_state(self) -> dict[str, Tensor]:
        """Where the next step starts: equal on all ranks, and of vectors whose direction counts, not their length."""
        return {f"powersgd_rank_{self.settings.rank}.{name}": basis for name, basis in self._basis_of.items()}


def _sort(bucket: Bucket, rank: int) -> tuple[list[str], Tensor, list[tuple[int, ...]]]:
    """Names of parameters whose gradients are compressed, places in the buffer of all others, `Matrices.places`."""
    compressed: list[str] = []
    dense = [torch.empty(0, dtype=torch.int64)]
    places: list[tuple[int, ...]] = []
    start = left = right = 0
    for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
        if _pays(parameter, rank):
            rows, columns = parameter.shape
            compressed.append(name)
            places.append((start, rows, columns, left, right))
            left, right = left + rank * rows, right + rank * columns
        else:
            dense.append(torch.arange(start, start + parameter.numel()))
        start += parameter.numel()
    return compressed, torch.cat(dense), places


def _pays(parameter: nn.Parameter, rank: int) -> bool:
    return is_large_matrix(parameter) and parameter.dim() == 2 and rank * sum(parameter.shape) < parameter.numel()
