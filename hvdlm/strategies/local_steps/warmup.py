"""The steps that all ranks make together before the first local one."""

from __future__ import annotations

from hvdlm.config import Config

# Codecs of gradients with which a model trains as with dense ones (docs/codecs.md). Before the first local step another
# one is replaced: one that delivers few numbers at once would leave AdamW with second moments of them.
_TRAIN_AS_DENSE = ("none", "fp16", "bf16", "int8", "int4")
_OTHERWISE = "int4"


def with_warmup_codec(config: Config) -> Config:
    """`config` with the codec of these steps."""
    codec = config.compression.codec
    chosen = {"codec": codec if codec in _TRAIN_AS_DENSE else _OTHERWISE}
    return config.model_copy(update={"compression": config.compression.model_copy(update=chosen)})
