"""The Newton-Schulz iteration that makes a matrix nearly orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor

# p(x) = a x + b x^3 + c x^5 moves singular values from (0, 1] to about (0.7, 1.2), and is steep at 0
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_LEAST_NORM = 1e-7


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: U S V^T becomes U S' V^T with S' about 1. (m, n) to bfloat16 (m, n).

    Five steps X = a X + (b A + c A^2) X with A = X X^T, of the smaller side, from X = M / |M| (Jordan et al., "Muon: An
    optimizer for hidden layers in neural networks", 2024). In bfloat16, by the same operations as
    torch.optim.Muon: a step takes back what the one before has rounded. `matrix` stays as it is.
    """
    rows, columns = matrix.shape
    x = matrix.to(torch.bfloat16, copy=True)
    if rows > columns:
        x = x.t()
    x.div_(x.norm().clamp(min=_LEAST_NORM))
    for _ in range(_STEPS):
        gram = x @ x.t()
        polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.addmm(x, polynomial, x, beta=_A)
    return x.t() if rows > columns else x


def flops(rows: int, columns: int) -> int:
    """Arithmetic of `orthogonalise`."""
    least, most = sorted((rows, columns))
    return _STEPS * 2 * (2 * least**2 * most + least**3)
