"""Squared norms of the gradient that each sequence has of a parameter, without making these gradients.

The gradient of a matrix W of y = x W^T is the sum over tokens t of g_t x_t^T, where g is the gradient of y. Its squared
norm is the sum over pairs of tokens of <g_t, g_s> <x_t, x_s>: two products of (T, T), whatever the size of the matrix
(Li et al., "Large Language Models Can Be Strong Differentially Private Learners", ICLR 2022, section 4; Goodfellow,
arXiv:1510.01799). For sequences that are long beside the matrix, parts of its rows are made one after the other, which
takes less arithmetic (Bu et al., arXiv:2205.10683, section 4).

Shapes: b sequences, T tokens, I inputs, O outputs of a matrix. Results are (b,) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a block of tokens, by bytes of a number: fewer make slow products, of slices in 16 bits above all
_FEWEST_TOKENS = {2: 512, 4: 64}
_BLOCKS = 8  # of tokens
_FEWEST_ROWS = 64  # of a part of a matrix
_PARTS = 4  # of a matrix at least, so that none is made whole
_SLOWNESS_OF_PARTS = {2: 2, 4: 1}  # beside pairs of tokens, for as much arithmetic
_NUMBERS = 2**20  # of such a part, of all sequences


def of_matrix(inputs: Tensor, grads: Tensor) -> Tensor:
    """Of W in y = x W^T. inputs: x, (b, T, I). grads: of y, (b, T, O)."""
    length, width, outputs = inputs.shape[1], inputs.shape[2], grads.shape[2]
    blocks = _blocks(length, inputs.itemsize)
    pairs = sum((end - start) * end for start, end in blocks)
    if pairs * (width + outputs) <= _SLOWNESS_OF_PARTS[inputs.itemsize] * length * width * outputs:
        return _by_pairs(inputs, grads, blocks)
    return _by_parts(inputs, grads)


def of_rows(grads: Tensor) -> Tensor:
    """Of a vector that is added to all tokens, as a bias is. grads: of the sum, (b, T, O)."""
    return grads.sum(dim=1, dtype=torch.float32).square().sum(dim=-1)


def of_embedding(tokens: Tensor, grads: Tensor) -> Tensor:
    """Of a matrix whose row x_t is the embedding of token t. tokens: x, (b, T) int64. grads: of those, (b, T, D).

    Tokens that occur more than once in a sequence add to the same row.
    """
    is_same = tokens[:, :, None] == tokens[:, None, :]  # (b, T, T)
    return ((grads @ grads.mT).float() * is_same).sum(dim=(1, 2))


def product_with_embedding(logit_grads: Tensor, inputs: Tensor, grads: Tensor) -> Tensor:
    """The inner product of what an embedding gets as such, and as the matrix E of the logits h E^T.

    logit_grads: (b, T, T), of token s the gradient of the logit of the token x_t. inputs: h, (b, T, D). grads: of
    embeddings, (b, T, D). Of rows v it is the sum of <sum_s G_sv h_s, sum_t [x_t = v] g_t>.
    """
    return (logit_grads.float() * (inputs @ grads.to(inputs.dtype).mT).float()).sum(dim=(1, 2))


def _blocks(length: int, itemsize: int) -> list[tuple[int, int]]:
    rows = max(_FEWEST_TOKENS[itemsize], -(-length // _BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _by_pairs(inputs: Tensor, grads: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """Pairs of tokens count twice, once made: of each block of tokens, those with earlier ones and with its own."""
    total = torch.zeros(len(inputs), device=inputs.device)
    for start, end in blocks:
        products = (inputs[:, start:end] @ inputs[:, :end].mT).float()  # (b, n, end)
        products *= grads[:, start:end] @ grads[:, :end].mT
        total += 2 * products[:, :, :start].sum(dim=(1, 2)) + products[:, :, start:].sum(dim=(1, 2))
    return total


def _by_parts(inputs: Tensor, grads: Tensor) -> Tensor:
    """The rows of the matrix in parts, of which each is made of all sequences at once."""
    sequences, _, width = inputs.shape
    outputs = grads.shape[2]
    rows = max(1, min(max(_FEWEST_ROWS, _NUMBERS // (sequences * width)), outputs // _PARTS))
    total = torch.zeros(sequences, device=inputs.device)
    for part in grads.split(rows, dim=2):
        total += (part.mT @ inputs).float().square().sum(dim=(1, 2))  # of (b, rows, I)
    return total
