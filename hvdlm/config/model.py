"""`[model]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hvdlm.config.section import Section, UserPath


class ModelSection(Section):
    """`[model]`: the shape of the Transformer. The preset fills what is not given."""

    preset: str = Field("tiny", description="named starting point; any field below overrides it")
    from_: UserPath = Field(
        "",
        alias="from",
        description="checkpoint, run directory or output of `hvdlm import`: training begins with its weights, and "
        "`[model]` with its shape in place of the preset's; empty: weights are initialised by train.seed",
    )
    layers: int = Field(4, gt=0, description="Transformer blocks")
    heads: int = Field(4, gt=0, description="attention (query) heads")
    kv_heads: int = Field(0, ge=0, description="key and value heads; 0: as many as heads")
    width: int = Field(128, gt=0, description="size of the residual stream")
    mlp_width: int = Field(0, ge=0, description="hidden size of the MLP; 0: 4 x width, or 8/3 x width for swiglu")
    context_length: int = Field(128, gt=0, description="tokens a sequence")
    vocab_size: int = Field(0, ge=0, description="tokens in the vocabulary; 0: the data set's")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation before each sub-layer")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance in the normalisation")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="MLP non-linearity")
    position: Literal["learned", "rope"] = Field("learned", description="position embedding")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: float = Field(0.0, ge=0, description="divides low rotary frequencies, as Llama 3.1 does; 0: does not")
    rope_low_frequency: float = Field(1.0, gt=0, description="turns in the original context below which it divides")
    rope_high_frequency: float = Field(4.0, gt=0, description="turns in the original context above which it does not")
    rope_original_context: int = Field(8192, gt=0, description="tokens of a sequence before it was scaled")
    bias: bool = Field(True, description="biases in linear layers and LayerNorm")
    qkv_bias: bool = Field(False, description="biases of queries, keys and values even without bias, as in Qwen2")
    tie_embeddings: bool = Field(True, description="output projection shares the token embedding")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an activation")
    document_mask: bool = Field(False, description="attention does not cross the bounds of documents")

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"model.width = {self.width} is not a multiple of model.heads = {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}")
        if self.position == "rope" and (self.width // self.heads) % 2:
            raise ValueError(
                "model.position = 'rope' rotates pairs of numbers, "
                f"but model.width / model.heads = {self.width // self.heads} is odd"
            )
        if self.rope_scaling and self.rope_low_frequency >= self.rope_high_frequency:
            raise ValueError(
                f"model.rope_low_frequency = {self.rope_low_frequency:g} is not below model.rope_high_frequency = "
                f"{self.rope_high_frequency:g}"
            )
        return self
