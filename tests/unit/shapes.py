"""Small shapes of a GPT-2 and of a Llama, for tests of formulas about models."""

from __future__ import annotations

from hvdlm.config import ModelSection
from hvdlm.model.presets import PRESETS

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


def preset(name: str) -> ModelSection:
    return ModelSection.model_validate({**PRESETS[name], "preset": name})
