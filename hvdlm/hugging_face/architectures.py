"""What a config.json of transformers says of a model, and `[model]`, either from the other.

GPT-2 (Radford et al. 2019), GPT-NeoX (arXiv:2204.06745) with residuals one after the other, Llama 2 and 3
(arXiv:2307.09288, arXiv:2407.21783), Mistral (arXiv:2310.06825) and Qwen2 (arXiv:2407.10671) are the architectures that
our Transformer can express. What it cannot is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.model.size import key_value_heads, mlp_width

_GPT2, _NEOX, _LLAMA, _MISTRAL, _QWEN2 = "gpt2", "gpt_neox", "llama", "mistral", "qwen2"

CLASSES = {
    _GPT2: "GPT2LMHeadModel",
    _NEOX: "GPTNeoXForCausalLM",
    _LLAMA: "LlamaForCausalLM",
    _MISTRAL: "MistralForCausalLM",
    _QWEN2: "Qwen2ForCausalLM",
}

# Their names of GELU by tanh, which is GPT-2's (arXiv:1606.08415, section 2)
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def architecture_of(model: ModelSection) -> str:
    """Which architecture of transformers computes what our Transformer does. Raises HvdlmError if none does."""
    kind = (model.position, model.norm, model.activation)
    has_qkv_bias_alone = model.qkv_bias and not model.bias
    if kind[1:] == ("layernorm", "gelu") and key_value_heads(model) == model.heads and not has_qkv_bias_alone:
        if model.position == "learned":
            return _GPT2
        if not model.rope_scaling:
            return _NEOX
    if kind == ("rope", "rmsnorm", "swiglu"):
        return _QWEN2 if has_qkv_bias_alone else _LLAMA
    named = ", ".join(f"model.{name} = {getattr(model, name)!r}" for name in ("position", "norm", "activation"))
    more = ", ".join(f"model.{name} = {getattr(model, name)!r}" for name in ("kv_heads", "qkv_bias"))
    raise HvdlmError(
        f"no architecture of transformers that hvdlm writes has {named}, {more}: it writes GPT-2 ('learned', "
        "'layernorm', 'gelu') and GPT-NeoX (with 'rope'), of as many key and value heads as heads, and Llama and Qwen2 "
        "('rope', 'rmsnorm', 'swiglu')"
    )


def to_config(model: ModelSection, vocab_size: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json. `dtype`: that of the weights, as PyTorch names it.

    Written as transformers 4 has it, which 5 also reads. Raises HvdlmError as `architecture_of` does.
    """
    architecture = architecture_of(model)
    common = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if architecture == _GPT2:
        return {
            **common,
            "n_positions": model.context_length,
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": mlp_width(model),
            "activation_function": "gelu_new",
            "layer_norm_epsilon": model.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
        }
    common |= {
        "max_position_embeddings": model.context_length,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": mlp_width(model),
    }
    if architecture == _NEOX:
        return {
            **common,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": model.norm_eps,
            "rotary_pct": 1.0,
            "rotary_emb_base": model.rope_theta,
            "use_parallel_residual": False,
            "attention_bias": True,
            **dict.fromkeys(("attention_dropout", "hidden_dropout"), model.dropout),
        }
    return {
        **common,
        "num_key_value_heads": key_value_heads(model),
        "head_dim": model.width // model.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _scaling_to(model),
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
    }


def from_config(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], int]:
    """Values of `[model]`, and the size of the vocabulary. `origin`: the file, for errors.

    Raises HvdlmError for an architecture, or a feature of one, that our Transformer cannot express.
    """
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in CLASSES:
        raise HvdlmError(
            f"{origin}: model_type = {architecture!r}, which hvdlm has no architecture for; it reads "
            f"{', '.join(CLASSES)}"
        )
    try:
        readers = {_GPT2: _from_gpt2, _NEOX: _from_neox}
        return readers.get(architecture, _from_llama)(config), int(config["vocab_size"])
    except _UnsupportedError as error:
        raise HvdlmError(f"{origin}: hvdlm's Transformer has no {error}") from None
    except KeyError as error:
        raise HvdlmError(f"{origin} has no {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise HvdlmError(f"{origin} is not the configuration of a model of type {architecture}: {error}") from None


class _UnsupportedError(Exception):
    """Names what our Transformer cannot express."""


def _require(config: Mapping[str, Any], **allowed: object) -> None:
    """Raises _UnsupportedError for a key whose value is neither absent nor among those `allowed`."""
    for key, values in allowed.items():
        value = config.get(key)
        if value is not None and value not in (values if isinstance(values, tuple) else (values,)):
            raise _UnsupportedError(f"{key} = {value!r}")


# What GPT-2 and GPT-NeoX have in common
_GELU_MODEL = {"kv_heads": 0, "norm": "layernorm", "activation": "gelu", "bias": True}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that all but GPT-2 have for them."""
    return {
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "width": config["hidden_size"],
        "mlp_width": config["intermediate_size"],
        "context_length": config["max_position_embeddings"],
    }


def _from_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(
        config,
        activation_function=_TANH_GELU,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return {
        **_GELU_MODEL,
        "layers": config["n_layer"],
        "heads": config["n_head"],
        "width": config["n_embd"],
        "mlp_width": config.get("n_inner") or 4 * config["n_embd"],
        "context_length": config["n_positions"],
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "position": "learned",
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _from_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}  # of transformers 5
    known = {
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "rotary_pct": rope.get("partial_rotary_factor", 0.25),
        "rope_type": rope.get("rope_type", "default"),
        **{name: value for name, value in config.items() if value is not None},
    }
    _require(
        known,
        hidden_act=_TANH_GELU,
        use_parallel_residual=False,
        rotary_pct=1.0,
        rope_type="default",
        rope_scaling=(),
        attention_bias=True,
    )
    return {
        **_GELU_MODEL,
        **_sizes(config),
        "norm_eps": float(config.get("layer_norm_eps", 1e-5)),
        "position": "rope",
        "rope_theta": float(config.get("rotary_emb_base") or rope.get("rope_theta") or 10000.0),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _from_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = config["model_type"]
    _require(config, hidden_act=("silu", "swish"), use_sliding_window=False, pretraining_tp=1)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") not in (None, width // heads):
        raise _UnsupportedError(
            f"head_dim = {config['head_dim']} beside hidden_size / num_attention_heads = {width // heads}"
        )
    sizes = _sizes(config)
    if architecture == _MISTRAL and (window := config.get("sliding_window")):
        # Within it every token sees all that went before
        sizes["context_length"] = min(sizes["context_length"], window)
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise _UnsupportedError(f"layer_types = {config['layer_types']!r}")
    bias = bool(config.get("attention_bias", False))
    if bias != bool(config.get("mlp_bias", False)):
        raise _UnsupportedError(f"attention_bias = {bias} beside mlp_bias = {not bias}")
    rope = config.get("rope_parameters") or {}  # of transformers 5
    return {
        **sizes,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "norm": "rmsnorm",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "activation": "swiglu",
        "position": "rope",
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "bias": bias,
        "qkv_bias": architecture == _QWEN2,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        **_scaling_from(config.get("rope_scaling") or rope),
    }


def _scaling_to(model: ModelSection) -> dict[str, Any] | None:
    if not model.rope_scaling:
        return None
    return {
        "rope_type": "llama3",
        "factor": model.rope_scaling,
        "low_freq_factor": model.rope_low_frequency,
        "high_freq_factor": model.rope_high_frequency,
        "original_max_position_embeddings": model.rope_original_context,
    }


def _scaling_from(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}
    if kind != "llama3":
        raise _UnsupportedError(f"rope_scaling of type {kind!r}")
    return {
        "rope_scaling": float(scaling["factor"]),
        "rope_low_frequency": float(scaling["low_freq_factor"]),
        "rope_high_frequency": float(scaling["high_freq_factor"]),
        "rope_original_context": int(scaling["original_max_position_embeddings"]),
    }
