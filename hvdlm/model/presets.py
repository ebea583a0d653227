"""Named shapes for `model.preset`: values of `[model]` that a configuration starts from.

All train without dropout, so that a loss curve does not depend on the number of
ranks. A preset names the shape only: weights are initialised anew.
"""

from __future__ import annotations

# Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2. The table's
# parameter counts are wrong; the released models have 124M, 355M, 774M and 1.5B.
_GPT2: dict[str, object] = {
    "vocab_size": 50257,
    "context_length": 1024,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "position": "learned",
    "bias": True,
    "tie_embeddings": True,
}

# Grattafiori et al., "The Llama 3 Herd of Models" (2024), arXiv:2407.21783, table 3.
_LLAMA3: dict[str, object] = {
    "vocab_size": 128256,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "activation": "swiglu",
    "position": "rope",
    "rope_theta": 500000.0,
    "bias": False,
}

PRESETS: dict[str, dict[str, object]] = {
    # GPT-2's design at the size of a laptop; the vocabulary is the data set's.
    "tiny": {**_GPT2, "vocab_size": 0, "layers": 4, "heads": 4, "width": 128, "context_length": 128},
    "gpt2": {**_GPT2, "layers": 12, "heads": 12, "width": 768},
    "gpt2-medium": {**_GPT2, "layers": 24, "heads": 16, "width": 1024},
    "gpt2-large": {**_GPT2, "layers": 36, "heads": 20, "width": 1280},
    "gpt2-xl": {**_GPT2, "layers": 48, "heads": 25, "width": 1600},
    # Llama 3.2 1B (model card meta-llama/Llama-3.2-1B), without the rescaled rotary frequencies
    # that stretch the published model to 131072 tokens.
    "llama-1b": {
        **_LLAMA3,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "width": 2048,
        "mlp_width": 8192,
        "context_length": 2048,
        "tie_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA3,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "width": 4096,
        "mlp_width": 14336,
        "context_length": 8192,
        "tie_embeddings": False,
    },
    "llama-70b": {
        **_LLAMA3,
        "layers": 80,
        "heads": 64,
        "kv_heads": 8,
        "width": 8192,
        "mlp_width": 28672,
        "context_length": 8192,
        "tie_embeddings": False,
    },
}
