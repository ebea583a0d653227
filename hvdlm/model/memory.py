"""Memory of a rank in training, by formula. Notation as in size.py."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hvdlm.config import Algorithm, ModelSection, Precision
from hvdlm.model.attention import (
    ATTENTION_BLOCK,
    LONGEST_PLAIN_ATTENTION,
    attention_blocks,
    repeats_key_value_heads,
)
from hvdlm.model.loss import loss_chunk_tokens
from hvdlm.model.size import key_value_heads, matmul_parameters, mlp_width, parameter_count, qkv_width

# Of a parameter, in the optimizer's state; matrices of Dion and Muon have half of AdamW's
_MOMENT_BYTES: dict[Algorithm, int] = {"adamw": 8, "adam": 8, "dion": 8, "muon": 8, "sgd": 4, "lion": 4}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank at the height of a step; what libraries and communication need comes on top."""

    parameters: int
    """fp32 master weights."""
    gradients: int
    """fp32."""
    moments: int
    """AdamW's and Adam's two, or one of SGD, Lion, Dion and Muon; fp32."""
    cast_parameters: int
    """Copies of the blocks' matrices in the precision of products."""
    activations: int
    """What the backward pass needs from the blocks."""
    temporary: int
    """What one block needs in addition while it is computed."""
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
    activation_checkpointing: bool = False,
    algorithm: Algorithm = "adamw",
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
    Where key and value heads are copied for their query heads, these copies, 2 a D, are kept in place of what they were
    made of. All blocks share the mask of documents, a bytes for each pair of tokens of a sequence.
    On the CPU, where PyTorch composes RMSNorm of smaller operations, it keeps another 12 D. torch.compile makes
    silu(gate) and those parts of RMSNorm anew in the backward pass. With activation checkpointing each block keeps its
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
    attention = qkv_width(config) + rotated + width
    is_grouped = key_value_heads(config) != heads
    if is_grouped and repeats_key_value_heads(device, low, config.document_mask):
        attention = (width if rotated else qkv_width(config)) + 2 * width + width
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
    mask = item * micro_batch_size * config.context_length**2 if config.document_mask else 0
    chunk = min(tokens, loss_chunk_tokens(vocab_size, item, device))
    block_parameters = matmul_parameters(config, vocab_size) - vocab_size * width
    copies = 2 * item if low else 0  # of the output weight, and its gradient of one chunk
    exponents = 0 if device == "cpu" else 4  # on a CPU only of a few tokens at once
    in_use = {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "moments": _MOMENT_BYTES[algorithm] * count - (4 * block_parameters if algorithm in ("dion", "muon") else 0),
        "cast_parameters": item * block_parameters if low else 0,
        "activations": mask
        + tokens * (config.layers * 4 * width + token if activation_checkpointing else config.layers * token),
        "temporary": temporary,
        "loss": 3 * 4 * tokens * width + (4 + copies) * vocab_size * width + chunk * vocab_size * (item + exponents),
    }
    return TrainingMemory(**in_use, gaps=sum(in_use.values()) // 4 if device == "cpu" else 0)


def sharded_memory(
    memory: TrainingMemory, config: ModelSection, vocab_size: int, stage: int, ranks: int, bucket_bytes: int
) -> TrainingMemory:
    """What is left of it on each of `ranks` ranks that divide moments (stage 1), gradients (2) and parameters (3).

    Besides, two parts of the model, blocks or the embedding, are whole in stage 3, and three buckets of gradients in
    stages 2 and 3, in the latter one a part. Of matrices in 16 bits each rank has the copies, and a part of the float32
    parameters.
    """
    item = 2 if memory.cast_parameters else 4
    embedding = vocab_size * config.width
    matrices = matmul_parameters(config, vocab_size) - embedding  # of blocks
    block = matrices // config.layers
    parameters, gradients, copies = memory.parameters, memory.gradients, memory.cast_parameters
    if stage == 3:
        parameters, copies = parameters // ranks, 2 * max(item * block, 4 * embedding)
    elif copies:
        parameters -= 4 * matrices - 4 * matrices // ranks
    if stage > 1:
        bucket = 4 * max(block, embedding) if stage == 3 else bucket_bytes
        gradients = min(gradients, gradients // ranks + 3 * bucket)
    moments = memory.moments // ranks
    held = {"parameters": parameters, "gradients": gradients, "moments": moments, "cast_parameters": copies}
    in_use = memory.total - memory.gaps
    change = sum(held.values()) - sum(getattr(memory, name) for name in held)
    return replace(memory, **held, gaps=memory.gaps * (in_use + change) // in_use)
