"""Memory of a rank in training, by formula. Notation as in size.py."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hvdlm.config import Algorithm, ModelSection, Precision
from hvdlm.model.attention import (
    ATTENTION_BLOCK,
    LONGEST_PLAIN_ATTENTION,
    attention_blocks,
    repeats_key_value_heads,
)
from hvdlm.model.layout import (
    ONE_RANK,
    Layout,
    Parameters,
    block_parameters,
    micro_batches_held,
    stage_blocks,
    stage_parameters,
    vocabulary_parameters,
)
from hvdlm.model.loss import loss_chunk_tokens
from hvdlm.model.size import key_value_heads, mlp_width

# Of a parameter, in the optimizer's state; matrices of Dion and Muon have half of AdamW's
_MOMENT_BYTES: dict[Algorithm, int] = {"adamw": 8, "adam": 8, "dion": 8, "muon": 8, "sgd": 4, "lion": 4}


# Buckets of gradients that ZeRO 2 and 3 hold at once: the one that is sent, and the one that fills
_BUCKETS_IN_FLIGHT = 2

# Of a model whose parameters are divided, too (ZeRO 3), blocks that a rank has whole: the one it computes, and the next
_GATHERED = 2


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank at the height of a step; what libraries and communication need comes on top."""

    parameters: int
    """fp32 master weights; with ZeRO this rank's slices of them."""
    gradients: int
    """fp32; with ZeRO 2 and 3 this rank's slices, and the buckets that are being sent."""
    moments: int
    """AdamW's and Adam's two, or one of SGD, Lion, Dion and Muon; fp32; with ZeRO this rank's slices."""
    working_parameters: int
    """What passes compute with beside the master weights: copies of the blocks' matrices in the precision of products;
    with ZeRO 1 and 2 the other parameters, too, and with ZeRO 3 what is gathered at once."""
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

    @property
    def double_precision(self) -> int:
        """By how much a copy of the model in float64 between two steps, where nothing of a step is kept, raises it."""
        return max(0, 2 * self.parameters - self.activations - self.temporary - self.loss)


def training_memory_bytes(
    config: ModelSection,
    vocab_size: int,
    micro_batch_size: int,
    precision: Precision,
    device: str = "cpu",
    compiled: bool = False,
    activation_checkpointing: bool = False,
    algorithm: Algorithm = "adamw",
    layout: Layout = ONE_RANK,
    micro_batches: int = 1,
    bucket_bytes: int = 0,
) -> TrainingMemory:
    """An estimate for one rank, on a "cpu" or "cuda" device, to see before a run whether it fits.

    Of a pipeline's stages it is the one that needs most: the first one, which holds most of the `micro_batches` of a
    step at once, or the last one, which has the loss. `bucket_bytes`: of gradients that ZeRO reduces at once.

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
    input, 4 D, and only one of them all the rest. Tensor ranks divide heads and M among them, and hold all the rest.
    """
    low = precision != "fp32"
    item = 2 if low else 4
    tokens = micro_batch_size * config.context_length
    token = saved_token_bytes(config, precision, device, compiled, layout)
    mask = item * micro_batch_size * config.context_length**2 if config.document_mask else 0
    temporary = item * tokens * 3 * mlp_width(config) / layout.tensor  # gradients of the MLP, and what is being made
    if _has_plain_attention(config, precision, device):
        heads, rows = config.heads // layout.tensor, min(ATTENTION_BLOCK, config.context_length)
        # probabilities, their gradients and their product, in fp32
        temporary = max(temporary, 3 * 4 * micro_batch_size * heads * rows * config.context_length)

    def of_stage(stage: int) -> TrainingMemory:
        held, blocks = micro_batches_held(micro_batches, layout, stage), stage_blocks(config, layout, stage)
        kept = held * blocks * 4 * config.width + token if activation_checkpointing else held * blocks * token
        is_last = stage == layout.pipeline - 1
        in_use = {
            **_state_bytes(config, vocab_size, low, algorithm, layout, stage, bucket_bytes),
            "activations": int(held * mask + tokens * kept),
            "temporary": int(temporary),
            "loss": _loss_bytes(config, vocab_size, tokens, low, device, layout) if is_last else 0,
        }
        return TrainingMemory(**in_use, gaps=sum(in_use.values()) // 4 if device == "cpu" else 0)

    return max((of_stage(stage) for stage in {0, layout.pipeline - 1}), key=lambda memory: memory.total)


def saved_token_bytes(config: ModelSection, precision: Precision, device: str, compiled: bool, layout: Layout) -> float:
    """Bytes that one block keeps of each token for its backward pass, on one rank: see `training_memory_bytes`."""
    width, low = config.width, precision != "fp32"
    item = 2 if low else 4
    query_width = width / layout.tensor
    key_value_width = query_width * key_value_heads(config) / config.heads
    projected = query_width + 2 * key_value_width
    rotated = query_width + key_value_width if config.position == "rope" else 0
    attention = projected + rotated + query_width
    is_grouped = key_value_heads(config) != config.heads
    if is_grouped and repeats_key_value_heads(device, low, config.document_mask):
        attention = (query_width if rotated else projected) + 2 * query_width + query_width
    if _has_plain_attention(config, precision, device):
        blocks = attention_blocks(config.context_length)
        keys = sum((end - start) * end for start, end in blocks) // config.context_length
        attention = 5 * query_width + config.heads // layout.tensor * keys
    activated = 2 if config.activation == "gelu" else 3 if compiled else 4
    token = 8 * width + item * (2 * width + attention + activated * mlp_width(config) / layout.tensor)
    if device == "cpu" and config.norm == "rmsnorm" and not compiled:
        token += 12 * width
    return token


def _has_plain_attention(config: ModelSection, precision: Precision, device: str) -> bool:
    is_short = config.context_length <= LONGEST_PLAIN_ATTENTION
    return device == "cpu" and precision != "fp32" and is_short and not config.document_mask


def _state_bytes(
    config: ModelSection,
    vocab_size: int,
    low: bool,
    algorithm: Algorithm,
    layout: Layout,
    stage: int,
    bucket_bytes: int,
) -> dict[str, int]:
    """Parameters, gradients, moments and working parameters of one rank of a stage."""
    counts = stage_parameters(config, vocab_size, layout, stage)
    own = counts.total if layout.zero == 0 else -(-counts.total // layout.shard)
    matrices = counts.matrices if layout.zero == 0 else -(-counts.matrices // layout.shard)
    gradients = 4 * counts.total
    if layout.zero >= 2:
        sending = _largest(_parameter_sizes(config, vocab_size, layout, stage), _BUCKETS_IN_FLIGHT)
        gradients = min(gradients, 4 * own + sum(max(bucket_bytes, 4 * size) for size in sending))
    return {
        "parameters": 4 * own,
        "gradients": gradients,
        "moments": _MOMENT_BYTES[algorithm] * own - (4 * matrices if algorithm in ("dion", "muon") else 0),
        "working_parameters": _working_bytes(config, counts, low, layout, stage, vocab_size),
    }


def _working_bytes(
    config: ModelSection, counts: Parameters, low: bool, layout: Layout, stage: int, vocab_size: int
) -> int:
    if layout.zero == 0:
        return 2 * counts.matrices if low else 0
    others = 4 * (counts.embeddings + counts.vectors)
    item = 2 if low else 4
    if layout.zero < 3:
        return item * counts.matrices + others
    gathered = [item * block_parameters(config, layout).matrices] * stage_blocks(config, layout, stage)
    gathered += [4 * size for size in _vocabulary_sizes(config, vocab_size, layout, stage)]
    return 4 * counts.vectors + sum(_largest(gathered, _GATHERED))


def _vocabulary_sizes(config: ModelSection, vocab_size: int, layout: Layout, stage: int) -> list[int]:
    """Numbers of each matrix of a stage that has a row for each token of the vocabulary."""
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    count = is_first + is_last - (is_first and is_last and config.tie_embeddings)
    return [vocabulary_parameters(config, vocab_size, layout)] * count


def _parameter_sizes(config: ModelSection, vocab_size: int, layout: Layout, stage: int) -> list[int]:
    """Numbers of the largest parameters of a stage: a bucket holds at least one, for none is cut."""
    expansions = 1 if config.activation == "gelu" else 2
    up = expansions * mlp_width(config) * config.width // layout.tensor
    return [*_vocabulary_sizes(config, vocab_size, layout, stage), *[up] * stage_blocks(config, layout, stage)]


def _largest(sizes: list[int], count: int) -> list[int]:
    return sorted(sizes, reverse=True)[:count]


def _loss_bytes(config: ModelSection, vocab_size: int, tokens: int, low: bool, device: str, layout: Layout) -> int:
    item = 2 if low else 4
    rows = vocabulary_parameters(config, vocab_size, layout) // config.width
    chunk = min(tokens, loss_chunk_tokens(rows, item, device))
    copies = 2 * item if low else 0  # of the output weight, and its gradient of one chunk
    exponents = 0 if device == "cpu" else 4  # on a CPU only of a few tokens at once
    return 3 * 4 * tokens * config.width + (4 + copies) * rows * config.width + chunk * rows * (item + exponents)
