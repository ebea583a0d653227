"""The momentum of matrices, of which two low-rank factors travel instead of gradients: Dion.

Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295, algorithm 1, and section 3 for several ranks.
G_i (m x n) is the gradient of rank i, M_i its momentum, Q (n x r) the right factor, equal on all ranks:

    M_i += G_i
    P = orthonormalised sum over i of M_i Q           first message
    R_i = M_i^T P,  R = sum over i of R_i             second message
    M_i -= (1 - mu) P R_i^T                           error feedback: what the update has not used stays in the momentum
    Q = R, each column divided by its length
    the update: P Q^T

These are r (m + n) numbers instead of m n. What is summed is linear in the momentum, so P, Q and the sum of all M_i are
those of one rank that has the sum of all gradients. The authors take an equal share of (1 - mu) P R^T from every M_i.
The sum is the same; but what one rank's momentum differs by from another's would then never become less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec, uses_loops
from hvdlm.gradients.codecs.low_rank import (
    Matrices,
    compile_for_cpu,
    draw_directions,
    multiply_factors,
    orthonormalise,
    set_directions,
)
from hvdlm.gradients.exchange import Exchange


class MatrixMomentum(Codec):
    """Adds the gradients of a bucket of matrices to this rank's momentum, and delivers the update of all ranks.

    The update of a matrix is orthonormal on its left side: P Q^T, whose columns P are orthonormal and Q of length 1. It
    does not depend on a factor that all gradients have.
    """

    def __init__(self, bucket: Bucket, settings: CompressionSection, matrix_rank: int, momentum: float) -> None:
        """`matrix_rank`: r. `momentum`: mu."""
        super().__init__(bucket, settings)
        buffer = bucket.buffer
        self.gradient_scale = 1.0  # by which this step's gradients are multiplied before they are added
        self._rank, self._momentum_decay = matrix_rank, momentum
        self._matrices = Matrices.one_after_another([tuple(each.shape) for each in bucket.parameters], matrix_rank)
        self._momentum = torch.zeros_like(buffer)
        self._lefts = buffer.new_empty(self._matrices.lefts())
        self._own_rights = buffer.new_empty(self._matrices.rights())
        self._rights = torch.empty_like(self._own_rights)
        self._basis = torch.empty_like(self._own_rights)
        for name, basis in zip(bucket.names, self._matrices.split_rights(self._basis), strict=True):
            draw_directions(basis, name)
        if buffer.is_cpu:
            compile_for_cpu()

    @torch.no_grad()
    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        """Replaces `gradients` by the update; by NaN where the momentum of some rank is not finite."""
        self._momentum.add_(gradients, alpha=self.gradient_scale)
        # What is summed over the ranks, or stays on this one, by the fastest products there are; what each computes for
        # itself and must be equal on all, by those of low_rank.py.
        for matrix, left, _, right in self._parts(self._basis):
            torch.mm(right, matrix.t(), out=left)
        exchange.all_reduce_(self._lefts)
        is_finite = self._lefts.isfinite().all()
        orthonormalise(self._matrices, self._lefts)
        for matrix, left, own, _ in self._parts(self._basis):
            torch.mm(left, matrix, out=own)
        self._rights.copy_(self._own_rights)
        exchange.all_reduce_(self._rights)
        is_finite = is_finite & self._rights.isfinite().all()
        if uses_loops(gradients) and not is_finite:
            gradients.fill_(math.nan)
            return
        for matrix, left, own, _ in self._parts(self._basis):
            matrix.addmm_(left.t(), own, alpha=self._momentum_decay - 1)
        for basis, rights in zip(*map(self._matrices.split_rights, (self._basis, self._rights)), strict=True):
            set_directions(basis, rights)  # one of length 0 stays as it is: its left vector is 0
        multiply_factors(self._matrices, self._lefts, self._basis, gradients)
        if not uses_loops(gradients):
            gradients.copy_(torch.where(is_finite, gradients, math.nan))

    def state(self) -> dict[str, Tensor]:
        """M_i, of which only the sum over ranks counts."""
        return {"momentum": self._momentum}

    def right_factors(self) -> dict[str, Tensor]:
        """Q of each matrix, (r, n), by name: views; equal on all ranks. Those of another r have other names."""
        factors = zip(self.bucket.names, self._matrices.split_rights(self._basis), strict=True)
        return {f"dion_rank_{self._rank}.{name}": basis for name, basis in factors}

    def _parts(self, rights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each matrix its momentum (m, n), left (r, m), own right (r, n) and these right vectors (r, n)."""
        matrices = self._matrices
        yield from zip(
            (matrix for (matrix,) in matrices.split(self._momentum)),
            matrices.split_lefts(self._lefts),
            matrices.split_rights(self._own_rights),
            matrices.split_rights(rights),
            strict=True,
        )
