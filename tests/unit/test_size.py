"""Formulas for parameters and arithmetic against the real module."""

from __future__ import annotations

import pytest
import torch
from shapes import GPT2, LLAMA, preset
from torch.utils.flop_counter import FlopCounterMode

from hvdlm.config import ModelSection
from hvdlm.model.loss import token_loss
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import flops_per_token, mlp_width, parameter_count
from hvdlm.model.transformer import Transformer

SHAPES = {
    "gpt2": GPT2,
    "gpt2-untied": GPT2.model_copy(update={"tie_embeddings": False}),
    "gpt2-no-bias": GPT2.model_copy(update={"bias": False}),
    "gpt2-one-kv-head": GPT2.model_copy(update={"kv_heads": 1}),
    "gpt2-rmsnorm": GPT2.model_copy(update={"norm": "rmsnorm"}),
    "gpt2-rope": GPT2.model_copy(update={"position": "rope"}),
    "llama": LLAMA,
    "llama-tied": LLAMA.model_copy(update={"tie_embeddings": True}),
    "llama-bias": LLAMA.model_copy(update={"bias": True, "mlp_width": 96}),
    "llama-layernorm": LLAMA.model_copy(update={"norm": "layernorm", "position": "learned"}),
}


def count(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# As Hugging Face counts its pretrained gpt2, gpt2-medium, gpt2-large and gpt2-xl, and as the model cards of
# Llama 3.2 1B (1.23B), Llama 3 8B (8.03B) and 70B (70.6B) have it.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_parameters_of_published_shapes(name, published):
    config = preset(name)
    assert parameter_count(config, config.vocab_size) == published
    with torch.device("meta"):
        assert count(Transformer(config, config.vocab_size)) == published


def test_every_preset_is_a_valid_shape_without_dropout():
    for name in PRESETS:
        assert preset(name).dropout == 0, name


def test_tiny_preset():
    config = preset("tiny")
    assert (config.layers, config.heads, config.width, config.context_length) == (4, 4, 128, 128)
    # 256 x 128 tokens, 128 x 128 positions, 4 blocks of 12 x 128^2 matrices, 13 x 128 biases and norms, last norm
    by_hand = 256 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    assert parameter_count(config, 256) == by_hand == count(Transformer(config, 256))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_parameters_of_every_option(config):
    assert parameter_count(config, 101) == count(Transformer(config, 101))


@pytest.mark.parametrize(
    ("width", "activation", "given", "expected"),
    [
        (96, "gelu", 0, 384),
        (96, "swiglu", 0, 256),
        (97, "swiglu", 0, 320),
        (4096, "swiglu", 0, 10944),
        (96, "gelu", 7, 7),
    ],
)
def test_mlp_width(width, activation, given, expected):
    """8/3 x 96 = 256; 8/3 x 97 = 258.7, the next multiple of 64 is 320; 8/3 x 4096 = 10922.7, next 10944."""
    assert mlp_width(ModelSection(heads=1, width=width, activation=activation, mlp_width=given)) == expected


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_flops_of_matrix_products_equal_those_counted(config):
    model = Transformer(config, 101)
    tokens = torch.randint(101, (3, config.context_length))
    # The counter does not know the in-place form by itself: (V, n) times (n, D), added to (V, D).
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        token_loss(model(tokens), model.output_weight, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        flops for operation, flops in counts.items() if str(operation) in ("aten.mm", "aten.addmm", "aten.addmm_")
    )
    attention = 12 * config.layers * config.width * config.context_length / 2
    assert products / tokens.numel() == flops_per_token(config, 101) - attention


def test_flops_of_attention_are_half_of_both_full_products():
    """Forward: scores and weighted values, T x T x E each a head, 2 operations a multiplication; backward twice."""
    config = GPT2
    batch, heads, length, head = 3, 4, 32, 16
    scores, values = torch.rand(batch, heads, length, head), torch.rand(batch, heads, length, length)
    with FlopCounterMode(display=False) as counter:
        scores @ scores.mT
        values @ scores
    full = 3 * config.layers * counter.get_total_flops() / (batch * length)
    longer = config.model_copy(update={"context_length": 64})
    assert flops_per_token(longer, 101) - flops_per_token(config, 101) == full / 2


def test_flops_of_gpt2_by_hand():
    # 12 x 12 x 768^2 + 50257 x 768 = 123,532,032 parameters in products; 6 x 12 x 768 x 1024 for attention
    assert flops_per_token(preset("gpt2"), 50257) == 6 * 123_532_032 + 56_623_104
