"""Formulas for parameters, arithmetic and memory against the real module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hvdlm.config import ModelSection
from hvdlm.model.linear import Linear
from hvdlm.model.loss import token_loss
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import (
    flops_per_token,
    loss_chunk_tokens,
    mlp_width,
    parameter_count,
    training_memory_bytes,
)
from hvdlm.model.transformer import Transformer

GPT2 = ModelSection(layers=2, heads=4, width=64, context_length=32)
LLAMA = ModelSection(
    layers=2,
    heads=4,
    kv_heads=2,
    width=64,
    context_length=32,
    norm="rmsnorm",
    activation="swiglu",
    position="rope",
    bias=False,
    tie_embeddings=False,
)
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


def preset(name: str) -> ModelSection:
    return ModelSection.model_validate({**PRESETS[name], "preset": name})


def count(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# As Hugging Face counts its pretrained gpt2, gpt2-medium, gpt2-large and gpt2-xl, and as the model cards of
# Llama 3.2 1B (1.23B) and Llama 3 8B (8.03B) have it.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
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


def test_memory_of_weights_by_hand():
    memory = training_memory_bytes(preset("gpt2"), 50257, 1, "bf16")
    assert memory.parameters == memory.gradients == 4 * 124_439_808
    assert memory.moments == 8 * 124_439_808
    assert memory.cast_parameters == 2 * 12 * 12 * 768**2
    parts = [memory.parameters, memory.gradients, memory.moments, memory.cast_parameters]
    in_use = sum(parts) + memory.activations + memory.temporary + memory.loss
    assert memory.total == in_use + memory.gaps
    assert memory.gaps == in_use // 4
    assert training_memory_bytes(preset("gpt2"), 50257, 1, "bf16", "cuda").gaps == 0
    assert training_memory_bytes(preset("gpt2"), 50257, 1, "fp32").cast_parameters == 0


@pytest.mark.parametrize("length", [128, 512, 1024])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_activations_are_what_autograd_saves(config, precision, length):
    """Every storage that the blocks save for backward, once, without parameters and their copies."""
    config = config.model_copy(update={"layers": 4, "width": 256, "context_length": length})
    model = Transformer(config, 101)
    model.compute_in(torch.bfloat16 if precision == "bf16" else torch.float32)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.low_weight is not None:
            own.add(layer.low_weight.untyped_storage().data_ptr())
    saved: dict[int, Tensor] = {}  # tensors are kept, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(101, (3, config.context_length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    estimate = training_memory_bytes(config, 101, 3, precision).activations
    assert estimate == pytest.approx(measured, rel=0.1)


def test_blocks_that_are_computed_again_keep_their_input_and_one_of_them_the_rest():
    config = preset("gpt2")
    whole = training_memory_bytes(config, 50257, 4, "bf16", "cuda")
    less = training_memory_bytes(config, 50257, 4, "bf16", "cuda", recompute=True)
    assert less.activations == 4 * 1024 * 12 * 4 * 768 + whole.activations // 12
    assert whole.total - less.total == whole.activations - less.activations


def test_a_gpu_holds_a_whole_chunk_of_logits_in_fp32_as_well():
    config = preset("gpt2")
    on_cpu, on_gpu = (training_memory_bytes(config, 50257, 16, "bf16", device) for device in ("cpu", "cuda"))
    assert on_gpu.loss - on_cpu.loss == 4 * 1335 * 50257


def test_chunk_of_logits():
    assert loss_chunk_tokens(50_257, 4) == 667  # 667 x 50,257 x 4 bytes are just below 128 MiB
    assert loss_chunk_tokens(50_257, 2) == 1335
    assert loss_chunk_tokens(280_000, 4) == 256
    assert loss_chunk_tokens(256, 4) == 4096
