"""The parameters that optimizers of matrices train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices of a Transformer's blocks, by name: weights of linear layers.

    Embeddings and the output weight are collections of vectors, one for each token or position. For these, as for
    biases and normalisation weights, AdamW is the better optimizer (Ahn et al., arXiv:2504.05295, section 2.3).
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_hidden_matrix(name, parameter.shape) and parameter.requires_grad
    }


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of a Transformer, if it is trained, is one of them."""
    return name.startswith("blocks.") and len(shape) == 2
