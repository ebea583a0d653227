"""Parameters and arithmetic of a model, by formula.

Notation: V vocabulary, T context, D width, L layers, H and K query and key-value
heads, E = D / H, M hidden size of the MLP.
"""

from __future__ import annotations

from hvdlm.config import ModelSection


def key_value_heads(config: ModelSection) -> int:
    """K: as many as query heads unless set."""
    return config.kv_heads or config.heads


def mlp_width(config: ModelSection) -> int:
    """M. Unless set: 4 D for GELU; for SwiGLU, which has three matrices for two, 8/3 D, rounded up to 64s."""
    if config.mlp_width:
        return config.mlp_width
    return 4 * config.width if config.activation == "gelu" else -(-8 * config.width // 192) * 64


def parameter_count(config: ModelSection, vocab_size: int) -> int:
    """All trained numbers.

    matrices   L (D (H + 2K) E + D^2 + m D M) + V D       m = 2 for GELU, 3 for SwiGLU
    biases     L ((H + 2K) E + D + (m - 1) M + D)         if there are biases; L (H + 2K) E if of these alone
    norms      (2L + 1) D                                 twice that for LayerNorm with bias
    embedding  V D if untied, + T D if positions are learned
    """
    width, layers = config.width, config.layers
    expansions = 1 if config.activation == "gelu" else 2
    count = matmul_parameters(config, vocab_size)
    count += 0 if config.tie_embeddings else vocab_size * width
    count += config.context_length * width if config.position == "learned" else 0
    count += (2 * layers + 1) * width * (2 if config.norm == "layernorm" and config.bias else 1)
    if config.bias:
        count += layers * (2 * width + expansions * mlp_width(config))
    if config.bias or config.qkv_bias:
        count += layers * qkv_width(config)
    return count


def undivided_parameters(config: ModelSection) -> int:
    """Trained numbers that every tensor rank has: norms, biases after a sum over ranks, learned positions."""
    width, layers = config.width, config.layers
    count = (2 * layers + 1) * width * (2 if config.norm == "layernorm" and config.bias else 1)
    count += 2 * layers * width if config.bias else 0
    return count + (config.context_length * width if config.position == "learned" else 0)


def flops_per_token(config: ModelSection, vocab_size: int) -> float:
    """Floating-point operations of forward and backward for one token of a full context.

    6 P + 6 L D T, where P counts the parameters that take part in matrix products (so not the embedding
    look-ups, but the output projection even if tied): 2 operations each forward and 4 backward (Kaplan et
    al. 2020, arXiv:2001.08361, section 2.1). Attention's two products take 4 D T forward a layer and three
    times that with the backward pass: 12 L D T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), of
    which half is counted here, 12 L D T / 2, because a causal kernel skips what lies in the future. What
    kernels recompute is not counted.
    """
    attention = 12 * config.layers * config.width * config.context_length / 2
    return 6 * matmul_parameters(config, vocab_size) + attention


def qkv_width(config: ModelSection) -> int:
    """(H + 2K) E: the rows of the fused query, key and value projection."""
    return config.width // config.heads * (config.heads + 2 * key_value_heads(config))


def matmul_parameters(config: ModelSection, vocab_size: int) -> int:
    """Parameters of matrix products: the matrices of all blocks, and the output projection even if tied."""
    width, matrices = config.width, 2 if config.activation == "gelu" else 3
    block = width * qkv_width(config) + width * width + matrices * width * mlp_width(config)
    return config.layers * block + vocab_size * width
