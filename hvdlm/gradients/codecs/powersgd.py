"""Codec `powersgd`: each matrix of gradients is sent as a low-rank approximation (Vogels et al., NeurIPS 2019).

Algorithm 1, where M_i (m x n) belongs to process i, and Q (n x r) are r = `compression.matrix_rank` vectors, equal on
all processes:

    P = orthonormalised sum over i of M_i Q         first message
    Q_i = M_i^T P,  Q = sum over i of Q_i           second message
    delivered: P Q^T

which is r (m + n) numbers instead of m n. The next step starts from Q (warm start): a step of power iteration on the
sum of gradients, whose largest singular vectors change slowly. All matrices of a bucket are sent together; biases,
normalisation weights and matrices that would not get smaller are sent as float32, with the first message.

Error feedback (algorithm 2): M_i is the sum of process i's gradient and old residual, and its new residual is M_i - P
Q_i^T = (1 - P P^T) M_i. Over all ranks residuals + delivered = sum M_i - P (sum Q_i)^T + P Q^T = sum M_i for any P, up
to the rounding of float32, on one rank too.

To owners of parts, parameter servers, each rank sends an approximation of its own M_i, made as if it were alone. An
owner needs no whole matrices: its rows of P Q_i^T follow from those of P and from Q_i.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blockwise import is_large_matrix
from hvdlm.gradients.codecs.codec import (
    Codec,
    add_dense_message_,
    dense_messages_,
    reduce_dense_,
    uses_loops,
)
from hvdlm.gradients.codecs.low_rank import (
    Matrices,
    compile_for_cpu,
    draw_directions,
    multiply,
    multiply_transposed,
    orthonormalise,
    reconstruct,
    set_directions,
)
from hvdlm.gradients.exchange import Exchange


class _Rows(NamedTuple):
    """What an owner has of a matrix, and gets as left vectors of these rows and all right vectors."""

    matrix: int
    rows: slice  # all of which it has a number
    before: int  # numbers of the first of them that another owner has
    span: slice  # in the owner's part


class _OwnerPart(NamedTuple):
    """What is sent to one owner: numbers as float32, then vectors."""

    dense: Tensor  # indices in the buffer
    pieces: list[_Rows]


class PowerSGD(Codec):
    """Sends large matrices as products with `compression.matrix_rank` vectors on either side; the rest as float32."""

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        buffer = bucket.buffer
        compressed, dense, layout = _sort(bucket, settings.matrix_rank)
        self._matrices = Matrices(settings.matrix_rank, torch.tensor(layout, dtype=torch.int64).reshape(-1, 5))
        self._dense = dense.to(buffer.device)  # indices in the buffer of what is sent as float32
        self._residual = torch.zeros_like(buffer)
        self._owner_parts: list[_OwnerPart] = []
        self._first_message = buffer.new_empty(len(dense) + self._matrices.lefts())
        self._lefts = self._first_message[len(dense) :]
        self._own_rights = buffer.new_empty(self._matrices.rights())
        self._rights = torch.empty_like(self._own_rights)
        self._basis = torch.empty_like(self._own_rights)
        self._basis_of = dict(zip(compressed, self._matrices.split_rights(self._basis), strict=True))
        for name, basis in self._basis_of.items():
            draw_directions(basis, name)
        if buffer.is_cpu:
            compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if step < self.settings.warmup_steps:
            reduce_dense_(gradients, self._residual, exchange)
            return
        if not self.settings.error_feedback:
            self._residual.zero_()
        matrices, residual = self._matrices, self._residual
        dense = self._first_message[: len(self._dense)]
        torch.add(gradients[self._dense], residual[self._dense], out=dense)
        multiply(matrices, gradients, residual, self._basis, self._lefts)
        exchange.all_reduce_(self._first_message)
        is_finite = self._first_message.isfinite().all()
        # All ranks see what is not finite: the step is not applied, and residuals stay as they were
        reads_numbers = uses_loops(gradients)
        if reads_numbers and not is_finite:
            gradients.fill_(math.nan)
            return
        if len(self._lefts):
            orthonormalise(matrices, self._lefts)
            multiply_transposed(matrices, gradients, residual, self._lefts, self._own_rights)
            self._rights.copy_(self._own_rights)
            exchange.all_reduce_(self._rights)
            is_finite = is_finite & self._rights.isfinite().all()
            if reads_numbers and not is_finite:
                gradients.fill_(math.nan)
                return
        old_residual = residual if reads_numbers else residual.clone()
        reconstruct(matrices, gradients, residual, self._lefts, self._own_rights, self._rights)
        gradients[self._dense] = dense
        residual.index_fill_(0, self._dense, 0)
        if not reads_numbers:
            gradients.copy_(torch.where(is_finite, gradients, math.nan))
            residual.copy_(torch.where(is_finite, residual, old_residual))
            self._rights.copy_(torch.where(is_finite, self._rights, 0.0))  # which leaves the basis as it is
        self._begin_next_from(self._rights)

    def _begin_next_from(self, rights: Tensor) -> None:
        for basis, found in zip(self._basis_of.values(), self._matrices.split_rights(rights), strict=True):
            set_directions(basis, found)

    def messages_to_owners(self, gradients: Tensor, owners: int, step: int) -> list[Tensor]:
        matrices, residual = self._matrices, self._residual
        if not self.settings.error_feedback:
            residual.zero_()
        if step < self.settings.warmup_steps:
            return dense_messages_(gradients, residual, owners)
        parts = self._split(owners)
        dense = [gradients[part.dense] + residual[part.dense] for part in parts]
        if len(self._lefts):
            multiply(matrices, gradients, residual, self._basis, self._lefts)
            orthonormalise(matrices, self._lefts)
            multiply_transposed(matrices, gradients, residual, self._lefts, self._own_rights)
            reconstruct(matrices, gradients, residual, self._lefts, self._own_rights, self._own_rights)
            self._begin_next_from(self._own_rights)
        lefts, rights = matrices.split_lefts(self._lefts), matrices.split_rights(self._own_rights)
        messages = []
        for part, numbers in zip(parts, dense, strict=True):
            residual.index_fill_(0, part.dense, 0)
            vectors = [each for n, rows, _, _ in part.pieces for each in (lefts[n][:, rows], rights[n])]
            messages.append(torch.cat([numbers, *(each.flatten() for each in vectors)]).view(torch.uint8))
        return messages

    def add_message_(self, message: Tensor, own: Tensor, owner: int, owners: int, step: int) -> None:
        if step < self.settings.warmup_steps:
            add_dense_message_(message, own)
            return
        part, numbers, matrix_rank = self._split(owners)[owner], message.view(torch.float32), self._matrices.matrix_rank
        own.index_add_(0, part.dense - owner * len(own), numbers[: len(part.dense)])
        position = len(part.dense)
        for matrix, rows, before, span in part.pieces:
            height, columns = rows.stop - rows.start, int(self._matrices.layout[matrix, 2])
            lengths = matrix_rank * height, matrix_rank * columns
            left, right = numbers[position : position + sum(lengths)].split(lengths)
            product = left.view(matrix_rank, height).t() @ right.view(matrix_rank, columns)
            own[span] += product.view(-1)[before : before + span.stop - span.start]
            position += sum(lengths)

    def _split(self, owners: int) -> list[_OwnerPart]:
        if len(self._owner_parts) != owners:
            length = len(self.bucket.buffer) // owners
            self._owner_parts = [
                _part_of_owner(self._matrices, owner * length, (owner + 1) * length) for owner in range(owners)
            ]
        return self._owner_parts

    def state(self) -> dict[str, Tensor]:
        return {"residual": self._residual} if self.settings.error_feedback else {}

    def extra_state(self) -> dict[str, Tensor]:
        """Q, where the next step starts: equal on all ranks; only the directions of its vectors matter."""
        return {f"powersgd_rank_{self.settings.matrix_rank}.{name}": basis for name, basis in self._basis_of.items()}


def _sort(bucket: Bucket, matrix_rank: int) -> tuple[list[str], Tensor, list[tuple[int, ...]]]:
    """Names of parameters whose gradients are compressed, indices of all other elements, `Matrices.layout`."""
    compressed: list[str] = []
    dense = [torch.empty(0, dtype=torch.int64)]
    layout: list[tuple[int, ...]] = []
    start = left = right = 0
    for name, parameter in zip(bucket.names, bucket.parameters, strict=True):
        if _is_smaller(parameter, matrix_rank):
            rows, columns = parameter.shape
            compressed.append(name)
            layout.append((start, rows, columns, left, right))
            left, right = left + matrix_rank * rows, right + matrix_rank * columns
        else:
            dense.append(torch.arange(start, start + parameter.numel()))
        start += parameter.numel()
    return compressed, torch.cat(dense), layout


def _is_smaller(parameter: nn.Parameter, matrix_rank: int) -> bool:
    return (
        is_large_matrix(parameter) and parameter.dim() == 2 and matrix_rank * sum(parameter.shape) < parameter.numel()
    )


def _part_of_owner(matrices: Matrices, begin: int, end: int) -> _OwnerPart:
    """What is sent to the owner of the numbers from `begin` to `end` of the buffer."""
    pieces, is_dense = list[_Rows](), torch.ones(end - begin, dtype=torch.bool)
    for matrix, (start, rows, columns, _, _) in enumerate(matrices.layout.tolist()):
        first, last = max(begin, start), min(end, start + rows * columns)
        if first >= last:
            continue
        top, bottom = (first - start) // columns, -(-(last - start) // columns)
        if matrices.matrix_rank * (bottom - top + columns) < last - first:
            span = slice(first - begin, last - begin)
            pieces.append(_Rows(matrix, slice(top, bottom), first - start - top * columns, span))
            is_dense[span] = False
    return _OwnerPart(begin + is_dense.nonzero().flatten(), pieces)
