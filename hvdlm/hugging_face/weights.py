"""Weights by our names, and by those of transformers, either from the other: the numbers are the same bits.

The table is that of hvdlm/model/transformer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.hugging_face.architectures import architecture_of
from hvdlm.model.size import key_value_heads, mlp_width
from hvdlm.model.transformer import without_memory

# Of old files: what is computed anew
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")

# As transformers 5 has it, but for files on its hub
_OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}


@dataclass(frozen=True)
class _Match:
    """One parameter of ours, and what transformers has for it."""

    ours: str
    theirs: tuple[str, ...]  # whose rows follow one another in ours
    rows: tuple[int, ...] = ()  # of each, where there are several
    is_transposed: bool = False  # theirs is (in, out)
    heads: int = 0  # theirs has the query, key and value of a head together, for so many heads

    def export(self, ours: Tensor) -> list[Tensor]:
        """What transformers has for a parameter of ours."""
        if self.heads:
            return [_regroup(ours, 3, self.heads)]
        parts = ours.split(list(self.rows)) if self.rows else [ours]
        return [(part.T if self.is_transposed else part).contiguous() for part in parts]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our parameter of what transformers has for it."""
        joined = torch.cat([each.T if self.is_transposed else each for each in theirs])
        return _regroup(joined, self.heads, 3) if self.heads else joined


def to_hugging_face(weights: Mapping[str, Tensor], model: ModelSection) -> dict[str, Tensor]:
    """Weights as transformers names them; a tied output projection is left out. Raises HvdlmError if it has no such
    architecture.

    GPT-2 and GPT-NeoX have biases: for a model without they are zeros.
    """
    named: dict[str, Tensor] = {}
    for match in _matches(model):
        ours = weights.get(match.ours)
        if ours is None:  # a bias
            weight = weights[match.ours.removesuffix("bias") + "weight"]
            ours = weight.new_zeros(len(weight))
        named.update(zip(match.theirs, match.export(ours), strict=True))
    return named


def from_hugging_face(
    named: Mapping[str, Tensor], model: ModelSection, vocab_size: int, origin: str
) -> dict[str, Tensor]:
    """Weights by our names, float32. `origin`: where they come from, for errors.

    Raises HvdlmError if one is missing, has another shape than the model's, or is not known.
    """
    shapes = {name: each.shape for name, each in without_memory(model, vocab_size).named_parameters()}
    used: set[str] = set()
    weights = {}
    for match in _matches(model):
        found = [_find(named, name) for name in match.theirs]
        if None in found:
            missing = match.theirs[found.index(None)]
            raise HvdlmError(f"{origin} holds no weight {missing}")
        used.update(name for name in found if name is not None)
        theirs = [named[name] for name in found if name is not None]
        expected = [tuple(each.shape) for each in match.export(torch.empty(shapes[match.ours], device="meta"))]
        if (shape := [tuple(each.shape) for each in theirs]) != expected:
            raise HvdlmError(
                f"{origin}: {' and '.join(match.theirs)} hold {_numbers(shape)} numbers, where config.json says "
                f"{_numbers(expected)}"
            )
        weights[match.ours] = match.join(theirs).float().contiguous()
    if unknown := sorted(name for name in named if name not in used and not _is_ignored(name, model)):
        raise HvdlmError(f"{origin} holds weights that hvdlm's Transformer does not have: {', '.join(unknown[:4])}")
    return weights


def _numbers(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(str(shape) for shape in shapes)


def _find(named: Mapping[str, Tensor], name: str) -> str | None:
    """The name under which a weight stands: files of the bare model have no first part of it."""
    names = (name, name.partition(".")[2], _OTHER_NAMES.get(name))
    return next((each for each in names if each in named), None)


def _regroup(rows: Tensor, before: int, after: int) -> Tensor:
    """Rows in `before` groups of `after` blocks, as `after` groups of `before` blocks."""
    return rows.view(before, after, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape).contiguous()


def _is_ignored(name: str, model: ModelSection) -> bool:
    """Buffers of old files, and the output projection where it is the embedding."""
    return name.endswith(_BUFFERS) or (name in ("lm_head.weight", "embed_out.weight") and model.tie_embeddings)


def _matches(model: ModelSection) -> Iterator[_Match]:
    architecture = architecture_of(model)
    yield from {"gpt2": _gpt2, "gpt_neox": _neox}.get(architecture, _llama)(model)
    if not model.tie_embeddings:
        yield _Match("output.weight", ("embed_out.weight" if architecture == "gpt_neox" else "lm_head.weight",))


def _gpt2(model: ModelSection) -> Iterator[_Match]:
    yield _Match("token_embedding.weight", ("transformer.wte.weight",))
    yield _Match("position_embedding.weight", ("transformer.wpe.weight",))
    norms = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
    matrices = {
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for layer in range(model.layers):
        for ours, theirs in {**norms, **matrices}.items():
            before, after = f"blocks.{layer}.{ours}", f"transformer.h.{layer}.{theirs}"
            yield _Match(f"{before}.weight", (f"{after}.weight",), is_transposed=ours in matrices)
            yield _Match(f"{before}.bias", (f"{after}.bias",))
    for kind in ("weight", "bias"):
        yield _Match(f"final_norm.{kind}", (f"transformer.ln_f.{kind}",))


def _neox(model: ModelSection) -> Iterator[_Match]:
    yield _Match("token_embedding.weight", ("gpt_neox.embed_in.weight",))
    names = {
        "attention_norm": "input_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.output": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    for layer in range(model.layers):
        for ours, theirs in names.items():
            heads = model.heads if ours == "attention.qkv" else 0
            for kind in ("weight", "bias"):
                yield _Match(
                    f"blocks.{layer}.{ours}.{kind}", (f"gpt_neox.layers.{layer}.{theirs}.{kind}",), heads=heads
                )
    for kind in ("weight", "bias"):
        yield _Match(f"final_norm.{kind}", (f"gpt_neox.final_layer_norm.{kind}",))


def _llama(model: ModelSection) -> Iterator[_Match]:
    yield _Match("token_embedding.weight", ("model.embed_tokens.weight",))
    head, hidden = model.width // model.heads, mlp_width(model)
    kv_rows = key_value_heads(model) * head
    attention = ("q_proj", "k_proj", "v_proj")
    for layer in range(model.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield _Match(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield _Match(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        for kind in ("weight", "bias"):
            fused = tuple(f"{theirs}.self_attn.{each}.{kind}" for each in attention)
            if kind == "weight" or model.bias or model.qkv_bias:
                yield _Match(f"{ours}.attention.qkv.{kind}", fused, (model.heads * head, kv_rows, kv_rows))
            if kind == "weight" or model.bias:
                yield _Match(f"{ours}.attention.output.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",))
                gated = (f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}")
                yield _Match(f"{ours}.mlp.up.{kind}", gated, (hidden, hidden))
                yield _Match(f"{ours}.mlp.down.{kind}", (f"{theirs}.mlp.down_proj.{kind}",))
    yield _Match("final_norm.weight", ("model.norm.weight",))
