"""What a shape costs, by formula: parameters, arithmetic, memory.

Notation: V vocabulary, T context, D width, L layers, H and K query and key-value
heads, E = D / H, M hidden size of the MLP. Knows nothing of torch, so that a plan
can be printed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from hvdlm.config import ModelSection, Precision

# Attention in 16 bits on a CPU is made of plain products (hvdlm.model.attention) for sequences up to so long: beyond,
# the probabilities that its backward pass needs outweigh what else a block keeps.
LONGEST_PLAIN_ATTENTION = 512

# Of queries that meet their keys at once there. Keys that lie after all of them are skipped, half of all in the end;
# what smaller blocks would gain is lost to smaller products.
ATTENTION_BLOCK = 256


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
    biases     L ((H + 2K) E + D + (m - 1) M + D)         if there are biases
    norms      (2L + 1) D                                 twice that for LayerNorm with bias
    embedding  V D if untied, + T D if positions are learned
    """
    width, layers = config.width, config.layers
    expansions = 1 if config.activation == "gelu" else 2
    count = _matmul_parameters(config, vocab_size)
    count += 0 if config.tie_embeddings else vocab_size * width
    count += config.context_length * width if config.position == "learned" else 0
    count += (2 * layers + 1) * width * (2 if config.norm == "layernorm" and config.bias else 1)
    if config.bias:
        count += layers * (_qkv_width(config) + 2 * width + expansions * mlp_width(config))
    return count


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
    return 6 * _matmul_parameters(config, vocab_size) + attention


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank at the height of a step; what libraries and communication need comes on top."""

    parameters: int
    """fp32 master weights."""
    gradients: int
    """fp32."""
    moments: int
    """AdamW's two, fp32."""
    cast_parameters: int
    """Copies of the blocks' matrices in the precision of products."""
    activations: int
    """What the backward pass needs from the blocks."""
    temporary: int
    """What one block needs beside while it is computed."""
    loss: int
    """Hidden states and their gradient, the output weight's copy and gradients, and one chunk of logits."""
    gaps: int
    """Between blocks in use on a CPU's heap: about a quarter of them, as measured (benchmarks/LOG.md)."""

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def training_memory_bytes(
    config: ModelSection,
    vocab_size: int,
    micro_batch_size: int,
    precision: Precision,
    device: str = "cpu",
    compiled: bool = False,
    recompute: bool = False,
) -> TrainingMemory:
    """An estimate for one rank, on a "cpu" or "cuda" device, to see before a run whether it fits.

    Weights, gradients and moments are exact. Activations are what this Transformer saves for its backward pass,
    without dropout. With a bytes a number in matrix products (4 for fp32, 2 for bf16 and fp16, where the residual
    stream stays in fp32), each token of a block keeps

        8 D          the input of both norms
        2 a D        the output of both norms
        a (H + 2K) E queries, keys, values; a (H + K) E more for those that RoPE has turned
        a D          attention's output
        2 a M        input and output of GELU; 4 a M with SwiGLU: gate, silu(gate), up and their product

    Where attention is made of plain products (`hvdlm.model.attention`) it keeps a (5 D + H S) instead: queries, keys
    and values of each query head, its output twice, and probabilities for the S keys that a token meets on average.
    On the CPU, where PyTorch composes RMSNorm of smaller operations, it keeps another 12 D. torch.compile makes
    silu(gate) and those parts of RMSNorm anew in the backward pass. Where blocks are computed again, each keeps its
    input, 4 D, and only one of them all the rest.
    """
    count = parameter_count(config, vocab_size)
    width, heads, hidden_width = config.width, config.heads, mlp_width(config)
    low = precision != "fp32"
    item = 2 if low else 4
    tokens = micro_batch_size * config.context_length
    key_value_width = width * key_value_heads(config) // heads
    rotated = width + key_value_width if config.position == "rope" else 0
    activated = 2 if config.activation == "gelu" else 3 if compiled else 4
    attention = _qkv_width(config) + rotated + width
    temporary = item * tokens * 3 * hidden_width  # gradients of the MLP's hidden numbers, and those being made
    if device == "cpu" and low and config.context_length <= LONGEST_PLAIN_ATTENTION and not config.document_mask:
        blocks = attention_blocks(config.context_length)
        keys = sum((end - start) * end for start, end in blocks) // config.context_length
        attention = 5 * width + heads * keys
        scores = micro_batch_size * heads * min(ATTENTION_BLOCK, config.context_length) * config.context_length
        temporary = max(temporary, 3 * 4 * scores)  # probabilities, their gradients and their product, in fp32
    token = 8 * width + item * (2 * width + attention + activated * hidden_width)
    if device == "cpu" and config.norm == "rmsnorm" and not compiled:
        token += 12 * width
    chunk = min(tokens, loss_chunk_tokens(vocab_size, item))
    block_parameters = _matmul_parameters(config, vocab_size) - vocab_size * width
    copies = 2 * item if low else 0  # of the output weight, and its gradient of one chunk
    exponents = 0 if device == "cpu" else 4  # on a CPU only of a few tokens at once
    in_use = {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "moments": 8 * count,
        "cast_parameters": item * block_parameters if low else 0,
        "activations": tokens * (config.layers * 4 * width + token if recompute else config.layers * token),
        "temporary": temporary,
        "loss": 3 * 4 * tokens * width + (4 + copies) * vocab_size * width + chunk * vocab_size * (item + exponents),
    }
    return TrainingMemory(**in_use, gaps=sum(in_use.values()) // 4 if device == "cpu" else 0)


def attention_blocks(length: int) -> list[tuple[int, int]]:
    """First query, and the one after the last, of each block that plain attention takes at once."""
    return [(start, min(start + ATTENTION_BLOCK, length)) for start in range(0, length, ATTENTION_BLOCK)]


def loss_chunk_tokens(vocab_size: int, item: int) -> int:
    """How many tokens' logits, of `item` bytes a number, `hvdlm.model.loss` holds at once: 128 MiB, within bounds.

    Each chunk also adds to the (V, D) gradient of the output weight, whose traffic is what small chunks pay:
    on 2 cores, 384 wide, 50,304 words, time was level from 256 tokens on and 1.7 times as much at 64. The
    upper bound keeps sums over a chunk within the range of fp16.
    """
    return min(max(128 * 2**20 // (item * vocab_size), 256), 4096)


def _qkv_width(config: ModelSection) -> int:
    """(H + 2K) E: the rows of the fused query, key and value projection."""
    return config.width // config.heads * (config.heads + 2 * key_value_heads(config))


def _matmul_parameters(config: ModelSection, vocab_size: int) -> int:
    width, matrices = config.width, 2 if config.activation == "gelu" else 3
    block = width * _qkv_width(config) + width * width + matrices * width * mlp_width(config)
    return config.layers * block + vocab_size * width
