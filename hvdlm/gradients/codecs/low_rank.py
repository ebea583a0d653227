"""Low-rank approximations of all matrices of a bucket, by left and right vectors of each: for PowerSGD and Dion.

PowerSGD approximates M = gradient + residual. It is read from both, so that neither changes before the step is known to
be finite. Loops compiled by Numba for the CPU read memory once each, for all matrices of a bucket in
one call; PyTorch operations do the same on other devices. What every rank computes for itself and must be equal on all
ranks is summed in the same order on every CPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvdlm.gradients.codecs.codec import uses_loops
from hvdlm.gradients.codecs.compiled import compiled

# A vector that keeps at most this share of its squared length is linearly dependent on those before it.
_NEGLIGIBLE = 2.0**-32

# Rows that are added to the right vectors in one pass over these.
_STRIP = 4

# For sums whose order is free, because the results are only then summed over ranks: these loops are vectorised.
_FREE_ORDER = {"reassoc", "contract", "nsz"}


class Matrices(NamedTuple):
    """Where matrices lie in a buffer, and their vectors in buffers of their own, `matrix_rank` for each, one by one."""

    matrix_rank: int  # vectors on either side of a matrix
    layout: Tensor  # (n, 5) int64, on the CPU: start, rows, columns, start of left and of right vectors

    @classmethod
    def one_after_another(cls, shapes: Sequence[tuple[int, ...]], matrix_rank: int) -> Matrices:
        """Matrices of these shapes that fill a buffer."""
        layout: list[tuple[int, ...]] = []
        start = left = right = 0
        for rows, columns in shapes:
            layout.append((start, rows, columns, left, right))
            start, left, right = start + rows * columns, left + matrix_rank * rows, right + matrix_rank * columns
        return cls(matrix_rank, torch.tensor(layout, dtype=torch.int64).reshape(-1, 5))

    def lefts(self) -> int:
        """Numbers in all left vectors: (matrix_rank, rows) for each matrix."""
        return self.matrix_rank * int(self.layout[:, 1].sum())

    def rights(self) -> int:
        """Numbers in all right vectors: (matrix_rank, columns) for each matrix."""
        return self.matrix_rank * int(self.layout[:, 2].sum())

    def split(self, *buffers: Tensor) -> Iterator[list[Tensor]]:
        """For each matrix its part (rows, columns) of each buffer."""
        for start, rows, columns, _, _ in self.layout.tolist():
            yield [buffer[start : start + rows * columns].view(rows, columns) for buffer in buffers]

    def split_lefts(self, lefts: Tensor) -> list[Tensor]:
        """The left vectors (matrix_rank, rows) of each matrix."""
        return [
            part.view(self.matrix_rank, -1) for part in lefts.split((self.matrix_rank * self.layout[:, 1]).tolist())
        ]

    def split_rights(self, rights: Tensor) -> list[Tensor]:
        """The right vectors (matrix_rank, columns) of each matrix."""
        return [
            part.view(self.matrix_rank, -1) for part in rights.split((self.matrix_rank * self.layout[:, 2]).tolist())
        ]


def multiply(matrices: Matrices, gradients: Tensor, residual: Tensor, rights: Tensor, lefts: Tensor) -> None:
    """Writes M times the right vectors into `lefts`."""
    if uses_loops(gradients):
        _multiply(*_arrays(matrices, gradients, residual, rights, lefts))
    else:
        multiply_with_torch(matrices, gradients, residual, rights, lefts)


def multiply_transposed(matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, rights: Tensor) -> None:
    """Writes M, transposed, times the left vectors into `rights`."""
    if uses_loops(gradients):
        _multiply_transposed(*_arrays(matrices, gradients, residual, lefts, rights))
    else:
        multiply_transposed_with_torch(matrices, gradients, residual, lefts, rights)


def reconstruct(
    matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, own_rights: Tensor, rights: Tensor
) -> None:
    """Writes left x `rights` into `gradients`, and M - left x `own_rights` into `residual`.

    Equal `lefts` and `rights` give equal `gradients`, bit for bit, on every CPU.
    """
    if uses_loops(gradients):
        _reconstruct(*_arrays(matrices, gradients, residual, lefts, own_rights, rights))
    else:
        reconstruct_with_torch(matrices, gradients, residual, lefts, own_rights, rights)


def orthonormalise(matrices: Matrices, lefts: Tensor) -> None:
    """Makes the left vectors of each matrix orthonormal; one that depends linearly on those before it becomes zero.

    Gram-Schmidt, each vector twice, which is enough (Giraud et al., Numerische Mathematik 2005), in float64.
    """
    if uses_loops(lefts):
        _orthonormalise(*_arrays(matrices, lefts))
    else:
        orthonormalise_with_torch(matrices, lefts)


def multiply_factors(matrices: Matrices, lefts: Tensor, rights: Tensor, products: Tensor) -> None:
    """Writes left x right into `products`: equal on all ranks where both are, bit for bit, on every CPU."""
    if uses_loops(products):
        _multiply_factors(*_arrays(matrices, lefts, rights, products))
    else:
        multiply_factors_with_torch(matrices, lefts, rights, products)


def draw_directions(basis: Tensor, name: str) -> None:
    """Random vectors (n, columns) to begin with: other ones for each name, the same on every rank in every run.

    In float64, of which PyTorch draws the same on every CPU.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    basis.copy_(torch.randn(basis.shape, generator=generator, dtype=torch.float64) / math.sqrt(basis.shape[1]))


def set_directions(basis: Tensor, rights: Tensor) -> None:
    """Sets each vector of `basis` (n, columns) to the direction of that of `rights`, unless that is zero."""
    if uses_loops(rights):
        squares = [_dot(vector, vector) for vector in rights.double().numpy()]
        lengths = torch.tensor(squares, dtype=torch.float64).sqrt().unsqueeze(1)
    else:
        lengths = torch.linalg.vector_norm(rights.double(), dim=1, keepdim=True)
    basis.copy_(torch.where(lengths > 0, rights / lengths, basis))


def compile_for_cpu() -> None:
    """Compiles the loops, or loads them from the cache, before the first training step."""
    matrices = Matrices(1, torch.tensor([[0, 1, 1, 0, 0]]))
    one = torch.ones(1)
    multiply(matrices, one, one, one, one.clone())
    multiply_transposed(matrices, one, one, one, one.clone())
    orthonormalise(matrices, one.clone())
    reconstruct(matrices, one.clone(), one.clone(), one, one, one)
    multiply_factors(matrices, one, one, one.clone())


def _arrays(matrices: Matrices, *tensors: Tensor) -> tuple[Any, ...]:
    return (matrices.matrix_rank, matrices.layout.numpy(), *(tensor.numpy() for tensor in tensors))


@compiled(fastmath=_FREE_ORDER)
def _multiply(
    matrix_rank: int,
    layout: np.ndarray,
    gradients: np.ndarray,
    residual: np.ndarray,
    rights: np.ndarray,
    lefts: np.ndarray,
) -> None:
    for matrix in range(len(layout)):
        start, rows, columns, left, right = layout[matrix]
        sum_row = np.empty(columns, np.float32)
        for row in range(rows):
            gradient_row = gradients[start + row * columns : start + (row + 1) * columns]
            residual_row = residual[start + row * columns : start + (row + 1) * columns]
            for column in range(columns):
                sum_row[column] = gradient_row[column] + residual_row[column]
            for which in range(matrix_rank):
                vector = rights[right + which * columns : right + (which + 1) * columns]
                total = np.float32(0)
                for column in range(columns):
                    total += sum_row[column] * vector[column]
                lefts[left + which * rows + row] = total


@compiled(fastmath=_FREE_ORDER)
def _multiply_transposed(
    matrix_rank: int,
    layout: np.ndarray,
    gradients: np.ndarray,
    residual: np.ndarray,
    lefts: np.ndarray,
    rights: np.ndarray,
) -> None:
    rights[:] = 0
    for matrix in range(len(layout)):
        start, rows, columns, left, right = layout[matrix]
        strip = np.zeros((_STRIP, columns), np.float32)
        factors = np.zeros((matrix_rank, _STRIP), np.float32)
        for top in range(0, rows, _STRIP):
            height = min(_STRIP, rows - top)
            factors[:, height:] = 0  # the last strip may have fewer rows: its other strip are left from the one before
            for offset in range(height):
                row = top + offset
                gradient_row = gradients[start + row * columns : start + (row + 1) * columns]
                residual_row = residual[start + row * columns : start + (row + 1) * columns]
                sum_row = strip[offset]
                for column in range(columns):
                    sum_row[column] = gradient_row[column] + residual_row[column]
                for which in range(matrix_rank):
                    factors[which, offset] = lefts[left + which * rows + row]
            first, second, third, fourth = strip[0], strip[1], strip[2], strip[3]
            for which in range(matrix_rank):
                a, b, c, d = factors[which, 0], factors[which, 1], factors[which, 2], factors[which, 3]
                vector = rights[right + which * columns : right + (which + 1) * columns]
                for column in range(columns):
                    vector[column] += a * first[column] + b * second[column] + c * third[column] + d * fourth[column]


@compiled()
def _reconstruct(
    matrix_rank: int,
    layout: np.ndarray,
    gradients: np.ndarray,
    residual: np.ndarray,
    lefts: np.ndarray,
    own_rights: np.ndarray,
    rights: np.ndarray,
) -> None:
    for matrix in range(len(layout)):
        start, rows, columns, left, right = layout[matrix]
        for row in range(rows):
            gradient_row = gradients[start + row * columns : start + (row + 1) * columns]
            residual_row = residual[start + row * columns : start + (row + 1) * columns]
            for column in range(columns):
                residual_row[column] += gradient_row[column]
                gradient_row[column] = 0
            for which in range(matrix_rank):
                factor = lefts[left + which * rows + row]
                own = own_rights[right + which * columns : right + (which + 1) * columns]
                total = rights[right + which * columns : right + (which + 1) * columns]
                for column in range(columns):
                    residual_row[column] -= factor * own[column]
                    gradient_row[column] += factor * total[column]


@compiled()
def _multiply_factors(
    matrix_rank: int, layout: np.ndarray, lefts: np.ndarray, rights: np.ndarray, products: np.ndarray
) -> None:
    whole = matrix_rank - matrix_rank % _STRIP
    for matrix in range(len(layout)):
        start, rows, columns, left, right = layout[matrix]
        vectors = rights[right : right + matrix_rank * columns].reshape(matrix_rank, columns)
        for row in range(rows):
            product = products[start + row * columns : start + (row + 1) * columns]
            product[:] = 0
            for which in range(0, whole, _STRIP):
                factor = left + which * rows + row
                a, b, c, d = lefts[factor], lefts[factor + rows], lefts[factor + 2 * rows], lefts[factor + 3 * rows]
                first, second, third, fourth = (
                    vectors[which],
                    vectors[which + 1],
                    vectors[which + 2],
                    vectors[which + 3],
                )
                for column in range(columns):
                    product[column] += (a * first[column] + b * second[column]) + (
                        c * third[column] + d * fourth[column]
                    )
            for which in range(whole, matrix_rank):
                factor, vector = lefts[left + which * rows + row], vectors[which]
                for column in range(columns):
                    product[column] += factor * vector[column]


@compiled()
def _orthonormalise(matrix_rank: int, layout: np.ndarray, lefts: np.ndarray) -> None:
    for matrix in range(len(layout)):
        rows, left = layout[matrix, 1], layout[matrix, 3]
        done = np.zeros((matrix_rank, rows))
        for which in range(matrix_rank):
            vector = lefts[left + which * rows : left + (which + 1) * rows].astype(np.float64)
            before = _dot(vector, vector)
            for _ in range(2):
                for earlier in range(which):
                    along = _dot(done[earlier], vector)
                    for row in range(rows):
                        vector[row] -= along * done[earlier, row]
            after = _dot(vector, vector)
            if after > _NEGLIGIBLE * before:
                done[which] = vector / np.sqrt(after)
            lefts[left + which * rows : left + (which + 1) * rows] = done[which]


@compiled()
def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Four independent sums, since an addition takes longer than it takes to issue the next one."""
    first, second, third, fourth = 0.0, 0.0, 0.0, 0.0
    whole = len(a) - len(a) % 4
    for i in range(0, whole, 4):
        first += a[i] * b[i]
        second += a[i + 1] * b[i + 1]
        third += a[i + 2] * b[i + 2]
        fourth += a[i + 3] * b[i + 3]
    for i in range(whole, len(a)):
        first += a[i] * b[i]
    return (first + second) + (third + fourth)


def multiply_with_torch(matrices: Matrices, gradients: Tensor, residual: Tensor, rights: Tensor, lefts: Tensor) -> None:
    """`multiply` on any device."""
    vectors = zip(matrices.split_rights(rights), matrices.split_lefts(lefts), strict=True)
    parts = zip(matrices.split(gradients, residual), vectors, strict=True)
    for (gradient_matrix, residual_matrix), (right, left) in parts:
        torch.mm(right, (gradient_matrix + residual_matrix).t(), out=left)


def multiply_transposed_with_torch(
    matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, rights: Tensor
) -> None:
    """`multiply_transposed` on any device."""
    vectors = zip(matrices.split_lefts(lefts), matrices.split_rights(rights), strict=True)
    parts = zip(matrices.split(gradients, residual), vectors, strict=True)
    for (gradient_matrix, residual_matrix), (left, right) in parts:
        torch.mm(left, gradient_matrix + residual_matrix, out=right)


def reconstruct_with_torch(
    matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, own_rights: Tensor, rights: Tensor
) -> None:
    """`reconstruct` on any device."""
    vectors = zip(
        matrices.split_lefts(lefts), matrices.split_rights(own_rights), matrices.split_rights(rights), strict=True
    )
    parts = zip(matrices.split(gradients, residual), vectors, strict=True)
    for (gradient_matrix, residual_matrix), (left, own, total) in parts:
        residual_matrix.add_(gradient_matrix).addmm_(left.t(), own, alpha=-1)
        torch.mm(left.t(), total, out=gradient_matrix)


def multiply_factors_with_torch(matrices: Matrices, lefts: Tensor, rights: Tensor, products: Tensor) -> None:
    """`multiply_factors` on any device."""
    vectors = zip(matrices.split_lefts(lefts), matrices.split_rights(rights), strict=True)
    for (product,), (left, right) in zip(matrices.split(products), vectors, strict=True):
        torch.mm(left.t(), right, out=product)


def orthonormalise_with_torch(matrices: Matrices, lefts: Tensor) -> None:
    """`orthonormalise` on any device, all matrices at once: zeros behind the shorter ones change no sum."""
    parts = matrices.split_lefts(lefts)
    longest = max((part.shape[1] for part in parts), default=0)
    done = lefts.new_zeros(len(parts), matrices.matrix_rank, longest, dtype=torch.float64)
    for part, padded in zip(parts, done, strict=True):
        padded[:, : part.shape[1]] = part
    for which in range(matrices.matrix_rank):
        vectors, earlier = done[:, which : which + 1], done[:, :which]  # (n, 1, longest), (n, which, longest)
        before = vectors.square().sum(2, keepdim=True)
        for _ in range(2):
            vectors -= vectors @ earlier.transpose(1, 2) @ earlier
        after = vectors.square().sum(2, keepdim=True)
        vectors *= torch.where(after > _NEGLIGIBLE * before, after.rsqrt(), 0.0)
    for part, padded in zip(parts, done, strict=True):
        part.copy_(padded[:, : part.shape[1]])
