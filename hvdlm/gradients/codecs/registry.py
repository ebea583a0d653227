"""The codecs by name, and the size of bucket that suits each."""

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
from hvdlm.gradients.codecs.masked import Masked
from hvdlm.gradients.codecs.powersgd import PowerSGD
from hvdlm.gradients.codecs.topk import TopK

CodecFactory = Callable[[Bucket, CompressionSection], Codec]

# The codec of each bucket is chosen by measurement: see gradients/auto/.
AUTO = "auto"

CODECS: dict[str, CodecFactory] = {
    "none": Dense,
    "fp16": partial(Cast, torch.float16),
    "bf16": partial(Cast, torch.bfloat16),
    "int8": partial(Integer, 8),
    "int4": partial(Integer, 4),
    "int2": partial(Integer, 2),
    "topk": partial(TopK, 16),
    "topk2": partial(TopK, 2),
    "powersgd": PowerSGD,
}

# Of differences of parameters alone, with local steps
_OF_DIFFERENCES: dict[str, CodecFactory] = {"masked": Masked}

# MiB of a bucket where `comm.bucket_mb` is 0 (benchmarks/LOG.md). Large buckets take fewer operations; small ones are
# sent sooner, which matters where much is sent over slow links.
_BUCKET_MB_ON_ONE_NODE = 16.0
_BUCKET_MB = {"int8": 8.0, "int4": 8.0, "int2": 8.0, "topk": 32.0, "topk2": 32.0, "powersgd": 32.0}
_DEFAULT_BUCKET_MB = 4.0

# The least on GPUs, as DistributedDataParallel's: no cache holds a bucket there, and a codec starts as many kernels for
# a small bucket as for a large one.
_BUCKET_MB_ON_GPUS = 25.0


def bucket_bytes(comm: CommSection, compression: CompressionSection, node_count: int, device: str = "cpu") -> int:
    """Approximate bytes of a bucket, for gradients on a "cpu" or "cuda" device."""
    megabytes = _BUCKET_MB.get(compression.codec, _DEFAULT_BUCKET_MB)
    if node_count == 1:
        megabytes = max(megabytes, _BUCKET_MB_ON_ONE_NODE)
    if device == "cuda":
        megabytes = max(megabytes, _BUCKET_MB_ON_GPUS)
    return int((comm.bucket_mb or megabytes) * 2**20)


def candidate_codecs(
    comm: CommSection, compression: CompressionSection, node_count: int, device: str = "cpu"
) -> dict[str, int]:
    """The codecs of `compression.candidates`, and the bytes of the buckets that suit each.

    Raises HvdlmError if one is unknown.
    """
    sizes = {}
    for name in (each.strip() for each in compression.candidates.split(",")):
        codec_factory(name)
        sizes[name] = bucket_bytes(comm, compression.model_copy(update={"codec": name}), node_count, device)
    return sizes


def codec_factory(name: str) -> CodecFactory:
    """The constructor of codec `name`, one of these or FILE.py:CLASS. Raises HvdlmError if it is unknown."""
    own = {**CODECS, **_OF_DIFFERENCES}
    if name in own:
        return own[name]
    path, colon, class_name = name.rpartition(":")
    if not colon:
        raise HvdlmError(
            f"compression.codec = {name!r} is unknown: it is one of {', '.join([*own, AUTO])}, "
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
