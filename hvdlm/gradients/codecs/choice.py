"""Which codec a name stands for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.cast import Cast
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.dense import Dense
from hvdlm.gradients.codecs.integer import Integer
from hvdlm.gradients.codecs.powersgd import PowerSGD
from hvdlm.gradients.codecs.topk import TopK

MakeCodec = Callable[[Bucket, CompressionSection], Codec]

# The codec that is chosen anew for each bucket, by measurement: see codecs/switching.py.
AUTO = "auto"

CODECS: dict[str, MakeCodec] = {
    "none": Dense,
    "fp16": partial(Cast, torch.float16),
    "bf16": partial(Cast, torch.bfloat16),
    "int8": partial(Integer, 8),
    "int4": partial(Integer, 4),
    "topk": TopK,
    "powersgd": PowerSGD,
}

# MiB of gradients that travel at once where `comm.bucket_mb` does not say (benchmarks/LOG.md). Large buckets cost fewer
# turns of the communication thread; small ones leave sooner, which matters where there is much to send and far to go.
_BUCKET_MB_ON_ONE_NODE = 16.0
_BUCKET_MB = {"int8": 8.0, "int4": 8.0, "topk": 32.0, "powersgd": 32.0}
_BUCKET_MB_OF_OTHERS = 4.0


def bucket_bytes(comm: CommSection, compression: CompressionSection, node_count: int) -> int:
    """Bytes of a bucket, about."""
    measured = _BUCKET_MB.get(compression.codec, _BUCKET_MB_OF_OTHERS)
    if node_count == 1:
        measured = max(measured, _BUCKET_MB_ON_ONE_NODE)
    return int((comm.bucket_mb or measured) * 2**20)


def codec_maker(name: str) -> MakeCodec:
    """What makes the codec called `name`, one of `CODECS` or FILE.py:CLASS, for a bucket; HvdlmError if unknown."""
    if name in CODECS:
        return CODECS[name]
    path, colon, class_name = name.rpartition(":")
    if not colon:
        raise HvdlmError(
            f"compression.codec = {name!r} is unknown: it is one of {', '.join([*CODECS, AUTO])}, "
            "or FILE.py:CLASS of your own"
        )
    if not Path(path).is_file():
        raise HvdlmError(f"compression.codec = {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise HvdlmError(f"compression.codec = {name!r}: {path} has no class {class_name} that derives from Codec")
    return found
