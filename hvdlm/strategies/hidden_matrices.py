"""The parameters that optimizers of matrices train."""

from __future__ import annotations

from torch import nn


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable matrices of a Transformer's blocks, by name: weights of linear layers.

    Embeddings and the output weight are collections of vectors, one for each token or position. For these, as for
    biases and normalisation weights, AdamW is the better optimizer (Ahn et al., arXiv:2504.05295, section 2.3).
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.dim() == 2 and parameter.requires_grad
    }
