"""Many matrices, and a few vectors to the left and to the right of each: the arithmetic of PowerSGD.

What is approximated is M = gradient + residual, read where both lie, so that neither changes before all is known. Loops
that Numba compiles for the CPU read memory once each, all matrices of a bucket in one call; PyTorch operations do the
same elsewhere. What every rank computes for itself and must be equal on all, sums in one order on every CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

# Of a vector less than this part (of its square) is left without its predecessors: it is their sum, but for rounding.
_NEGLIGIBLE = 2.0**-32

# Rows that are added to the right vectors together: these are then read and written once for so many.
_STRIP = 4

# For sums whose order is free, because what they make is only then summed over ranks: all lanes of a core work.
_FREE_ORDER = {"reassoc", "contract", "nsz"}


class Matrices(NamedTuple):
    """Where matrices lie in a buffer, and `rank` vectors for each in buffers of their own: vector by vector."""

    rank: int
    places: Tensor  # (n, 5) int64, on the CPU: start, rows, columns, start of left and of right vectors

    def lefts(self) -> int:
        """Numbers in all left vectors: (rank, rows) for each matrix."""
        return self.rank * int(self.places[:, 1].sum())

    def rights(self) -> int:
        """Numbers in all right vectors: (rank, columns) for each matrix."""
        return self.rank * int(self.places[:, 2].sum())

    def cut(self, *buffers: Tensor) -> Iterator[list[Tensor]]:
        """For each matrix its part (rows, columns) of each buffer."""
        for start, rows, columns, _, _ in self.places.tolist():
            yield [buffer[start : start + rows * columns].view(rows, columns) for buffer in buffers]

    def cut_lefts(self, lefts: Tensor) -> list[Tensor]:
        """The left vectors (rank, rows) of each matrix."""
        return [part.view(self.rank, -1) for part in lefts.split((self.rank * self.places[:, 1]).tolist())]

    def cut_rights(self, rights: Tensor) -> list[Tensor]:
        """The right vectors (rank, columns) of each matrix."""
        return [part.view(self.rank, -1) for part in rights.split((self.rank * self.places[:, 2]).tolist())]


def multiply(matrices: Matrices, gradients: Tensor, residual: Tensor, rights: Tensor, lefts: Tensor) -> None:
    """Writes M times the right vectors into `lefts`."""
    if gradients.is_cpu:
        _multiply(*_arrays(matrices, gradients, residual, rights, lefts))
    else:
        multiply_with_torch(matrices, gradients, residual, rights, lefts)


def multiply_transposed(matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, rights: Tensor) -> None:
    """Writes M, transposed, times the left vectors into `rights`."""
    if gradients.is_cpu:
        _multiply_transposed(*_arrays(matrices, gradients, residual, lefts, rights))
    else:
        multiply_transposed_with_torch(matrices, gradients, residual, lefts, rights)


def deliver(matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, own: Tensor, all_: Tensor) -> None:
    """Leaves M less the products of left and `own` right vectors in `residual`; with `all_` right ones in `gradients`.

    Equal `lefts` and `all_` make equal `gradients`, bit for bit, on every CPU.
    """
    if gradients.is_cpu:
        _deliver(*_arrays(matrices, gradients, residual, lefts, own, all_))
    else:
        deliver_with_torch(matrices, gradients, residual, lefts, own, all_)


def orthonormalise(matrices: Matrices, lefts: Tensor) -> None:
    """Makes the left vectors of each matrix orthonormal; one that is a sum of those before it becomes zero.

    Gram-Schmidt, each vector twice, which is enough (Giraud et al., Numerische Mathematik 2005), in float64.
    """
    if lefts.is_cpu:
        _orthonormalise(*_arrays(matrices, lefts))
    else:
        orthonormalise_with_torch(matrices, lefts)


def point_along(basis: Tensor, rights: Tensor) -> None:
    """Turns each vector of `basis` (n, columns) into the direction of that of `rights`; if that is zero, it stays."""
    lengths = torch.linalg.vector_norm(rights.double(), dim=1, keepdim=True)
    basis.copy_(torch.where(lengths > 0, rights / lengths, basis))


def compile_for_cpu() -> None:
    """Compiles all loops, or loads what an earlier process has compiled, so that no training step has to."""
    matrices = Matrices(1, torch.tensor([[0, 1, 1, 0, 0]]))
    one = torch.ones(1)
    multiply(matrices, one, one, one, one.clone())
    multiply_transposed(matrices, one, one, one, one.clone())
    orthonormalise(matrices, one.clone())
    deliver(matrices, one.clone(), one.clone(), one, one, one)


def _arrays(matrices: Matrices, *tensors: Tensor) -> tuple[Any, ...]:
    return (matrices.rank, matrices.places.numpy(), *(tensor.numpy() for tensor in tensors))


@numba.njit(cache=True, nogil=True, fastmath=_FREE_ORDER)
def _multiply(
    rank: int, places: np.ndarray, gradients: np.ndarray, residual: np.ndarray, rights: np.ndarray, lefts: np.ndarray
) -> None:
    for matrix in range(len(places)):
        start, rows, columns, left, right = places[matrix]
        line = np.empty(columns, np.float32)
        for row in range(rows):
            fresh = gradients[start + row * columns : start + (row + 1) * columns]
            owed = residual[start + row * columns : start + (row + 1) * columns]
            for column in range(columns):
                line[column] = fresh[column] + owed[column]
            for which in range(rank):
                vector = rights[right + which * columns : right + (which + 1) * columns]
                total = np.float32(0)
                for column in range(columns):
                    total += line[column] * vector[column]
                lefts[left + which * rows + row] = total


@numba.njit(cache=True, nogil=True, fastmath=_FREE_ORDER)
def _multiply_transposed(
    rank: int, places: np.ndarray, gradients: np.ndarray, residual: np.ndarray, lefts: np.ndarray, rights: np.ndarray
) -> None:
    rights[:] = 0
    for matrix in range(len(places)):
        start, rows, columns, left, right = places[matrix]
        lines = np.zeros((_STRIP, columns), np.float32)
        factors = np.zeros((rank, _STRIP), np.float32)
        for top in range(0, rows, _STRIP):
            height = min(_STRIP, rows - top)
            factors[:, height:] = 0  # the last strip may have fewer rows; its other lines are of the one before
            for place in range(height):
                row = top + place
                fresh = gradients[start + row * columns : start + (row + 1) * columns]
                owed = residual[start + row * columns : start + (row + 1) * columns]
                line = lines[place]
                for column in range(columns):
                    line[column] = fresh[column] + owed[column]
                for which in range(rank):
                    factors[which, place] = lefts[left + which * rows + row]
            first, second, third, fourth = lines[0], lines[1], lines[2], lines[3]
            for which in range(rank):
                a, b, c, d = factors[which, 0], factors[which, 1], factors[which, 2], factors[which, 3]
                vector = rights[right + which * columns : right + (which + 1) * columns]
                for column in range(columns):
                    vector[column] += a * first[column] + b * second[column] + c * third[column] + d * fourth[column]


@numba.njit(cache=True, nogil=True)
def _deliver(
    rank: int,
    places: np.ndarray,
    gradients: np.ndarray,
    residual: np.ndarray,
    lefts: np.ndarray,
    own: np.ndarray,
    all_: np.ndarray,
) -> None:
    for matrix in range(len(places)):
        start, rows, columns, left, right = places[matrix]
        for row in range(rows):
            fresh = gradients[start + row * columns : start + (row + 1) * columns]
            owed = residual[start + row * columns : start + (row + 1) * columns]
            for column in range(columns):
                owed[column] += fresh[column]
                fresh[column] = 0
            for which in range(rank):
                factor = lefts[left + which * rows + row]
                mine = own[right + which * columns : right + (which + 1) * columns]
                ours = all_[right + which * columns : right + (which + 1) * columns]
                for column in range(columns):
                    owed[column] -= factor * mine[column]
                    fresh[column] += factor * ours[column]


@numba.njit(cache=True, nogil=True)
def _orthonormalise(rank: int, places: np.ndarray, lefts: np.ndarray) -> None:
    for matrix in range(len(places)):
        rows, left = places[matrix, 1], places[matrix, 3]
        done = np.zeros((rank, rows))
        for which in range(rank):
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


@numba.njit(cache=True, nogil=True)
def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Four sums side by side, since an addition takes longer than it takes to begin the next one."""
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
    vectors = zip(matrices.cut_rights(rights), matrices.cut_lefts(lefts), strict=True)
    for (fresh, owed), (right, left) in zip(matrices.cut(gradients, residual), vectors, strict=True):
        torch.mm(right, (fresh + owed).t(), out=left)


def multiply_transposed_with_torch(
    matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, rights: Tensor
) -> None:
    """`multiply_transposed` on any device."""
    vectors = zip(matrices.cut_lefts(lefts), matrices.cut_rights(rights), strict=True)
    for (fresh, owed), (left, right) in zip(matrices.cut(gradients, residual), vectors, strict=True):
        torch.mm(left, fresh + owed, out=right)


def deliver_with_torch(
    matrices: Matrices, gradients: Tensor, residual: Tensor, lefts: Tensor, own: Tensor, all_: Tensor
) -> None:
    """`deliver` on any device."""
    vectors = zip(matrices.cut_lefts(lefts), matrices.cut_rights(own), matrices.cut_rights(all_), strict=True)
    for (fresh, owed), (left, mine, ours) in zip(matrices.cut(gradients, residual), vectors, strict=True):
        owed.add_(fresh).addmm_(left.t(), mine, alpha=-1)
        torch.mm(left.t(), ours, out=fresh)


def orthonormalise_with_torch(matrices: Matrices, lefts: Tensor) -> None:
    """`orthonormalise` on any device, all matrices at once: zeros behind the shorter ones change no sum."""
    parts = matrices.cut_lefts(lefts)
    longest = max((part.shape[1] for part in parts), default=0)
    done = lefts.new_zeros(len(parts), matrices.rank, longest, dtype=torch.float64)
    for part, padded in zip(parts, done, strict=True):
        padded[:, : part.shape[1]] = part
    for which in range(matrices.rank):
        vectors, earlier = done[:, which : which + 1], done[:, :which]  # (n, 1, longest), (n, which, longest)
        before = vectors.square().sum(2, keepdim=True)
        for _ in range(2):
            vectors -= vectors @ earlier.transpose(1, 2) @ earlier
        after = vectors.square().sum(2, keepdim=True)
        vectors *= torch.where(after > _NEGLIGIBLE * before, after.rsqrt(), 0.0)
    for part, padded in zip(parts, done, strict=True):
        part.copy_(padded[:, : part.shape[1]])
