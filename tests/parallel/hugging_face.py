"""Hugging Face's GPT-2 and Llama with the weights of our Transformer: an independent implementation to compare with."""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ["HF_HUB_OFFLINE"] = "1"

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hvdlm.config import ModelSection
from hvdlm.model.transformer import Transformer


def gpt2_weights(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    mapped = {
        "transformer.wte.weight": weights["token_embedding.weight"],
        "transformer.wpe.weight": weights["position_embedding.weight"],
        "transformer.ln_f.weight": weights["final_norm.weight"],
        "transformer.ln_f.bias": weights["final_norm.bias"],
        "lm_head.weight": weights["token_embedding.weight"],
    }
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for layer in range(layers):
        for ours, theirs in names.items():
            weight = weights[f"blocks.{layer}.{ours}.weight"]
            # Conv1D multiplies from the right: its matrices are (in, out).
            mapped[f"transformer.h.{layer}.{theirs}.weight"] = weight.T if weight.ndim == 2 else weight
            mapped[f"transformer.h.{layer}.{theirs}.bias"] = weights[f"blocks.{layer}.{ours}.bias"]
    return mapped


def llama_weights(weights: Mapping[str, Tensor], config: ModelSection) -> dict[str, Tensor]:
    mapped = {
        "model.embed_tokens.weight": weights["token_embedding.weight"],
        "model.norm.weight": weights["final_norm.weight"],
        "lm_head.weight": weights.get("output.weight", weights["token_embedding.weight"]),
    }
    names = {
        "attention_norm": "input_layernorm",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.down": "mlp.down_proj",
    }
    head = config.width // config.heads
    for layer in range(config.layers):
        for ours, theirs in names.items():
            mapped[f"model.layers.{layer}.{theirs}.weight"] = weights[f"blocks.{layer}.{ours}.weight"]
        rows = weights[f"blocks.{layer}.attention.qkv.weight"].split(
            [config.heads * head, config.kv_heads * head, config.kv_heads * head]
        )
        for letter, matrix in zip("qkv", rows, strict=True):
            mapped[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = matrix
        gate, up = weights[f"blocks.{layer}.mlp.up.weight"].split(config.mlp_width)
        mapped[f"model.layers.{layer}.mlp.gate_proj.weight"] = gate
        mapped[f"model.layers.{layer}.mlp.up_proj.weight"] = up
    return mapped


def hugging_face_gpt2(model: Transformer, vocabulary: int) -> GPT2LMHeadModel:
    config = model.config
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=config.context_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            layer_norm_epsilon=config.norm_eps,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    reference.load_state_dict(gpt2_weights(model.state_dict(), config.layers))
    return reference.eval()


def hugging_face_llama(model: Transformer, vocabulary: int) -> LlamaForCausalLM:
    config = model.config
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )
    reference.load_state_dict(llama_weights(model.state_dict(), config))
    return reference.eval()
