"""A decoder-only Transformer, GPT-2 or Llama or between them by configuration.

Pre-norm blocks (Radford et al. 2019), causal attention with as many or fewer key
and value heads than query heads (Ainslie et al. 2023, arXiv:2305.13245), learned
positions or RoPE (Su et al. 2021, arXiv:2104.09864), LayerNorm or RMSNorm (Zhang and
Sennrich 2019, arXiv:1910.07467), GELU in GPT-2's tanh approximation or SwiGLU
(Shazeer 2020, arXiv:2002.05202).

Shapes: B sequences, T tokens, D = width, V = vocabulary, H query heads, K key and
value heads, E = D / H the size of a head, M the hidden size of the MLP.

Names here and in Hugging Face's models, whose weights map one to one:

| parameter                              | shape           | GPT2LMHeadModel      | LlamaForCausalLM                  |
| -------------------------------------- | --------------- | -------------------- | --------------------------------- |
| token_embedding.weight                 | (V, D)          | transformer.wte      | model.embed_tokens                |
| position_embedding.weight              | (context, D)    | transformer.wpe      |                                   |
| blocks.N.attention_norm.weight, bias   | (D,)            | transformer.h.N.ln_1 | model.layers.N.input_layernorm    |
| blocks.N.attention.qkv.weight, bias    | ((H + 2K) E, D) | .attn.c_attn         | .self_attn.q_proj, k_proj, v_proj |
| blocks.N.attention.output.weight, bias | (D, D)          | .attn.c_proj         | .self_attn.o_proj                 |
| blocks.N.mlp_norm.weight, bias         | (D,)            | .ln_2                | .post_attention_layernorm         |
| blocks.N.mlp.up.weight, bias           | (M or 2M, D)    | .mlp.c_fc            | .mlp.gate_proj, up_proj           |
| blocks.N.mlp.down.weight, bias         | (D, M)          | .mlp.c_proj          | .mlp.down_proj                    |
| final_norm.weight, bias                | (D,)            | transformer.ln_f     | model.norm                        |
| output.weight, if untied               | (V, D)          |                      | lm_head                           |

GPT2LMHeadModel holds the matrices of a block transposed. Where one parameter stands for
several of a Llama, its rows are theirs in the order given.

Parameters are registered in the order in which the forward pass uses them, so that
their reverse is about the order in which the backward pass completes gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.model.attention import causal_attention
from hvdlm.model.linear import Linear
from hvdlm.model.loss import TokenStatistics, token_loss, token_statistics
from hvdlm.model.parameter_access import EMBEDDING, OUTPUT, ParameterAccess
from hvdlm.model.size import key_value_heads, mlp_width

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (T, E / 2), fp32


class Transformer(nn.Module):
    """Tokens to hidden states; `logits` or `hvdlm.model.loss.token_loss` take them to the vocabulary.

    Weights are what PyTorch's modules begin with until `initialise` is called. There are no buffers,
    so a model may be made on the `meta` device, given memory by `to_empty`, and then initialised.
    """

    def __init__(self, config: ModelSection, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.context_length, config.width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = _norm(config)
        self.output = None if config.tie_embeddings else nn.Linear(config.width, vocab_size, bias=False)
        self._compute_dtype: torch.dtype | None = None  # of matrix products; None: that of the parameters
        self.activation_checkpointing = False  # keep only each block's input, and compute it again in the backward pass
        self.parameter_access: ParameterAccess | None = None
        self._linear = [layer for layer in self.blocks.modules() if isinstance(layer, Linear)]

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Computes matrix products in `dtype`. Parameters, norms and the residual stream stay in fp32.

        Call it after the model has been moved to its device.
        """
        self._compute_dtype = dtype
        for layer in self._linear:
            layer.set_compute_dtype(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return self._compute_dtype or self.output_weight.dtype

    def update_low_precision_weights(self) -> None:
        """Copies the parameters to the low-precision weights of all layers; call it when parameters have changed."""
        for layer in self._linear:
            layer.update_low_precision_weights()

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix from hidden states to logits: the token embedding's own if they are tied."""
        return self.token_embedding.weight if self.output is None else self.output.weight

    def forward(self, tokens: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states after the final norm.

        tokens: (B, T) int64. documents: (B, T) int64, as from `document_ids`; a token then attends only to
        earlier tokens of its own document. Its position stays that in the sequence: it is not reset where a
        document begins. cache: keys and values of tokens that went before; these tokens follow them and are
        added to it.

        Returns (B, T, D). Raises HvdlmError if the sequence is longer than `context_length`.
        """
        config = self.config
        length = tokens.shape[1]
        start = cache.length if cache else 0
        if start + length > config.context_length:
            raise HvdlmError(
                f"a sequence of {start + length} tokens does not fit into model.context_length = "
                f"{config.context_length}: shorten the sequence or train with a longer context"
            )
        positions = torch.arange(start, start + length, device=tokens.device)
        x = self.embed(tokens, positions)
        x = self.apply_blocks(range(config.layers), x, positions, documents, cache)
        if cache:
            cache.length += length
        hidden: Tensor = self.final_norm(x)
        return self.parameter_access.before(OUTPUT, hidden) if self.parameter_access else hidden

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block is given. tokens: (B, T) int64, positions: (T,) int64. Returns (B, T, D)."""
        access = self.parameter_access
        tokens = access.before(EMBEDDING, tokens) if access else tokens
        x: Tensor = self.token_embedding(tokens)  # (B, T, D)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x = access.after(EMBEDDING, x) if access else x
        return self.dropout(x)  # type: ignore[no-any-return]

    def apply_blocks(
        self,
        layers: Iterable[int],
        x: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x: (B, T, D), of tokens at `positions`, (T,) int64, through some blocks, by number; the rest as `forward`."""
        rotation = _rotation(positions, self.config) if self.config.position == "rope" else None
        mask = _attention_mask(positions, documents, cache, self.dtype)
        access = self.parameter_access
        # Chen et al. 2016, arXiv:1604.06174
        recomputes = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for layer in layers:
            block = self.blocks[layer]
            x = access.before(layer, x) if access else x
            if recomputes:
                x = checkpoint(block, x, rotation, mask, None, use_reentrant=False)
            else:
                x = block(x, rotation, mask, cache.layer(layer, len(positions)) if cache else None)
            x = access.after(layer, x) if access else x
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities of the next token: (..., D) to (..., V)."""
        return functional.linear(hidden.to(self.dtype), self.output_weight.to(self.dtype))

    def token_loss(self, hidden: Tensor, targets: Tensor, grad_scale: float = 1.0) -> Tensor:
        """The loss of hidden states, (..., D), summed over targets, (...): see `hvdlm.model.loss.token_loss`."""
        return token_loss(hidden, self.output_weight, targets, self.dtype, grad_scale=grad_scale)

    def token_statistics(self, hidden: Tensor, targets: Tensor) -> TokenStatistics:
        """Loss and accuracy without gradients. Arguments as of `token_loss`."""
        return token_statistics(hidden, self.output_weight, targets, self.dtype)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Sets every parameter, as a function of the seed and the shape alone.

        Matrices and embeddings are drawn from N(0, 0.02^2), the two projections into the residual stream
        of each block from N(0, 0.02^2 / (2 layers)) (Radford et al. 2019, section 2.3); norms begin as the
        identity and biases at 0. Numbers are drawn on the CPU, so every device begins with the same.
        """
        values = dict(self.named_parameters())
        for name, initial in self.initial_values(seed):
            values[name].copy_(initial)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """What `initialise` sets each parameter to, by name, on the CPU: one at a time, for models that are too large
        to be anywhere as a whole.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                yield name, torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0, device="cpu")
                continue
            into_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            deviation = 0.02 / (2 * self.config.layers) ** 0.5 if into_residual else 0.02
            yield name, torch.empty(parameter.shape, device="cpu").normal_(0, deviation, generator=generator)

    def own_values(self, whole: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Of values of all parameters of the whole model, by name, those that are of this one, which may be a part."""
        yield from whole


def without_memory(config: ModelSection, vocab_size: int) -> Transformer:
    """A whole model that has names and shapes, and nothing else."""
    with torch.device("meta"):
        return Transformer(config, vocab_size)


class Block(nn.Module):
    """Attention and MLP, each normalised before it and added to the residual stream after it."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cached: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x: (B, T, D) to (B, T, D); the other arguments are `Attention`'s."""
        attended: Tensor = self.dropout(self.attention(self.attention_norm(x), rotation, mask, cached))
        x = x + attended
        transformed: Tensor = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + transformed


class Attention(nn.Module):
    """Causal self-attention; each of K key and value heads serves H / K query heads."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.heads = config.heads
        self.key_value_heads = key_value_heads(config)
        self.head_width = config.width // config.heads
        self.dropout = config.dropout
        rows = (self.heads + 2 * self.key_value_heads) * self.head_width
        self.qkv = Linear(config.width, rows, bias=config.bias or config.qkv_bias)
        self.output = Linear(config.width, config.width, bias=config.bias)

    def forward(
        self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cached: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x: (B, T, D) to (B, T, D).

        mask: (B or 1, 1, T, S), added to the scores of queries, or None for plain causal attention.
        cached: keys and values (B, K, S, E) whose last T places these tokens fill.
        """
        heads, key_value_heads = self.heads, self.key_value_heads
        qkv = self.qkv(x)
        batch, length, _ = qkv.shape  # not of x, of which tensor ranks may have a part
        qkv = qkv.view(batch, length, heads + 2 * key_value_heads, self.head_width).transpose(1, 2)
        queries, keys, values = qkv.split([heads, key_value_heads, key_value_heads], dim=1)  # (B, H or K, T, E)
        if rotation is not None:
            queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)
        if cached is not None:
            cached[0][:, :, -length:], cached[1][:, :, -length:] = keys, values
            keys, values = cached
        dropout = self.dropout if self.training else 0.0
        attended = self.attend(queries, keys, values, mask, dropout)  # (B, H, T, E)
        output: Tensor = self.output(attended.transpose(1, 2).reshape(batch, length, -1))
        return output

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Arguments and result as of `causal_attention`."""
        return causal_attention(queries, keys, values, mask, dropout)


class MLP(nn.Module):
    """down(gelu(up(x))); for SwiGLU, where up makes a gate as well, down(silu(gate) * up)."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        hidden = mlp_width(config)
        self.gated = config.activation == "swiglu"
        self.up = Linear(config.width, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.down = Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D) to (B, T, D)."""
        activation = self.up(x)  # (B, T, M), or (B, T, 2M) if gated
        if self.gated:
            gate, activation = activation.chunk(2, dim=-1)
            activation = functional.silu(gate) * activation
        else:
            activation = _gelu(activation)
        output: Tensor = self.down(activation)
        return output


class KeyValueCache:
    """Keys and values of the tokens a model has seen, so that the next token costs one position.

    Holds (layers, B, K, capacity, E) of each, on the model's device and in the dtype of its products.
    `length` is how many tokens are in it; setting it to 0 empties it.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int | None = None) -> None:
        """`capacity`: tokens that it has room for; None: as many as the context."""
        config, device = model.config, model.output_weight.device
        capacity = capacity or config.context_length
        shape = (
            config.layers,
            batch_size,
            key_value_heads(config),
            capacity,
            config.width // config.heads,
        )
        self.keys = torch.zeros(shape, dtype=model.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.documents = torch.zeros(batch_size, capacity, dtype=torch.int64, device=device)
        self.length = 0

    def layer(self, index: int, new: int) -> tuple[Tensor, Tensor]:
        """Views (B, K, length + new, E) of one layer's keys and values; the last `new` are to be filled."""
        end = self.length + new
        return self.keys[index, :, :, :end], self.values[index, :, :, :end]


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Which document of its sequence each token belongs to, counted from 0.

    tokens: (B, T) integers to (B, T) int64. An end-of-text token belongs to the document that it ends.
    """
    ends = (tokens == eos_id).long()
    return ends.cumsum(dim=1) - ends


def _gelu(x: Tensor) -> Tensor:
    """GELU in GPT-2's approximation, x (1 + tanh(z)) / 2 = x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3).

    (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.) Of the second form torch.compile makes vector
    instructions, of tanh calls: on a CPU it takes a third of the time.
    """
    if not torch.compiler.is_compiling():
        return functional.gelu(x, approximate="tanh")
    y = x.float()
    return (y * torch.sigmoid((8 / math.pi) ** 0.5 * (y + 0.044715 * y * y * y))).to(x.dtype)


def _norm(config: ModelSection) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)


def _attention_mask(
    positions: Tensor, documents: Tensor | None, cache: KeyValueCache | None, dtype: torch.dtype
) -> Tensor | None:
    """(B or 1, 1, T, S), 0 where a query may look and -inf elsewhere; None where attention is plainly causal or one
    query sees all keys.

    Numbers, because PyTorch would make them of a bool mask in each layer, and keep those of all for the backward pass.
    """
    start, length = cache.length if cache else 0, len(positions)
    if documents is None and (start == 0 or length == 1):
        return None
    keys = torch.arange(start + length, device=positions.device)  # (S,)
    mask = (positions[:, None] >= keys)[None]  # (1, T, S)
    if documents is not None:
        key_documents = documents
        if cache:
            cache.documents[:, start : start + length] = documents
            key_documents = cache.documents[:, : start + length]
        mask = mask & (documents[:, :, None] == key_documents[:, None, :])  # (B, T, S)
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return added[:, None]


def _rotation(positions: Tensor, config: ModelSection) -> Rotation:
    """Angles position * theta^(-2i / E), i < E / 2 (Su et al. 2021, equation 15); fp32 whatever the model is in.

    Scaled for longer contexts, frequencies that turn less than `rope_low_frequency` times in the original context are
    divided by the factor, those that turn more than `rope_high_frequency` times stay, and between them it is
    interpolated (Llama 3.1; arXiv:2407.21783, section 3.4.2, does not give the formula, Meta's published code does).
    """
    head_width = config.width // config.heads
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling:
        turns = config.rope_original_context * frequencies / (2 * math.pi)
        low, high = config.rope_low_frequency, config.rope_high_frequency
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rope_scaling)
    angles = positions[:, None].float() * frequencies  # (T, E / 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the pairs (x[i], x[i + E / 2]) by their angles. x: (B, H, T, E).

    The paper pairs neighbours; halves, as in Llama's published weights, are the same up to the order of rows.
    """
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(x.dtype)
