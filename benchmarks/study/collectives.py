"""Ways to sum a tensor over all ranks: hvdlm's engines, ring and codecs, and the calls of MPI, Gloo and Horovod."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.ring import Ring
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.choice import codec_maker
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange

# Codecs whose sums of small integers are exact.
_EXACT = ("none", "fp16", "bf16")

_ROW = 1024  # numbers in a row of the matrix that a codec takes a tensor for


@dataclass(frozen=True)
class Way:
    """`reduce` sums a 1-D tensor in place; `is_exact`: integers come out right."""

    name: str
    dtypes: Sequence[torch.dtype]
    reduce: Callable[[Tensor], object]
    is_exact: bool = True


def ways_of_engine(communicator: Communicator, device: torch.device) -> list[Way]:
    """What hvdlm's engine does, and what its users would call themselves."""
    ours = Way(f"hvdlm {communicator.engine}", _TYPES, communicator.all_reduce_)
    if communicator.engine == "mpi" and device.type == "cpu":
        return [ours, Way("mpi4py Allreduce", (torch.float32, torch.int32), _by_mpi)]
    if communicator.engine == "torch":
        return [ours, Way("torch.distributed all_reduce", _TYPES, _by_torch)]
    if communicator.engine == "horovod":
        return [ours, Way("Horovod allreduce_", (torch.float32, torch.float16, torch.int32), _by_horovod)]
    return [ours]


def ways_of_ring(communicator: Communicator, device: torch.device, codecs: Sequence[str]) -> list[Way]:
    """hvdlm's own ring over an engine's messages, plain and under codecs; none on GPUs, or without messages."""
    if device.type != "cpu" or not communicator.supports("send"):
        return []
    ring = Ring(communicator)
    plain = Way(f"hvdlm ring over {communicator.engine}", (torch.float32,), ring.all_reduce_)
    exchange = Exchange(communicator, ring, [])
    return [plain, *(_by_codec(name, communicator.engine, exchange) for name in codecs)]


def has_horovod() -> bool:
    return importlib.util.find_spec("horovod") is not None


_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32)


def _by_codec(name: str, engine: str, exchange: Exchange) -> Way:
    settings = CompressionSection(codec=name, error_feedback=name not in _EXACT)
    kept: dict[int, Codec] = {}

    def reduce(values: Tensor) -> None:
        length = len(values)
        if length not in kept:
            kept.clear()  # sizes come one after the other
            shape = (length // _ROW, _ROW) if length % _ROW == 0 else (length,)
            kept[length] = codec_maker(name)(Bucket({"matrix": nn.Parameter(torch.empty(shape))}), settings)
        kept[length].reduce_(values, exchange, 1)
        exchange.clear()

    return Way(f"hvdlm {name} over {engine}", (torch.float32,), reduce, name in _EXACT)


def _by_mpi(values: Tensor) -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, values.numpy())


def _by_torch(values: Tensor) -> None:
    torch.distributed.all_reduce(values)


def _by_horovod(values: Tensor) -> None:
    import horovod.torch as hvd

    hvd.allreduce_(values, op=hvd.Sum, name=f"benchmark.{values.dtype}.{len(values)}")
