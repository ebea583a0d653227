"""Implementations of all-reduce: hvdlm's engines, ring and codecs, and the calls of mpi4py, PyTorch and Horovod."""

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
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import codec_factory
from hvdlm.gradients.exchange import Exchange

# Codecs that sum small integers exactly.
_EXACT = ("none", "fp16", "bf16")

_ROW = 1024  # a tensor is given to a codec as a matrix with rows of so many elements


@dataclass(frozen=True)
class Way:
    """An implementation of all-reduce. `reduce` sums a 1-D tensor in place, small integers exactly if `is_exact`."""

    name: str
    dtypes: Sequence[torch.dtype]
    reduce: Callable[[Tensor], object]
    is_exact: bool = True


def ways_of_engine(communicator: Communicator, device: torch.device) -> list[Way]:
    """hvdlm's engine, and the library call that it is built on."""
    engine = Way(f"hvdlm {communicator.engine}", _TYPES, communicator.all_reduce_)
    if communicator.engine == "mpi" and device.type == "cpu":
        return [engine, Way("mpi4py Allreduce", (torch.float32, torch.int32), _by_mpi)]
    if communicator.engine == "torch":
        return [engine, Way("torch.distributed all_reduce", _TYPES, _by_torch)]
    if communicator.engine == "horovod":
        return [engine, Way("Horovod allreduce_", (torch.float32, torch.float16, torch.int32), _by_horovod)]
    return [engine]


def ways_of_ring(communicator: Communicator, device: torch.device, codecs: Sequence[str]) -> list[Way]:
    """hvdlm's ring over an engine's point-to-point messages, without and with codecs.

    None on a GPU, or if the engine has no point-to-point messages.
    """
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
    codecs: dict[int, Codec] = {}  # by length

    def reduce(values: Tensor) -> None:
        length = len(values)
        if length not in codecs:
            codecs.clear()  # the benchmark does not return to a size
            shape = (length // _ROW, _ROW) if length % _ROW == 0 else (length,)
            codecs[length] = codec_factory(name)(Bucket({"matrix": nn.Parameter(torch.empty(shape))}), settings)
        codecs[length].reduce_(values, exchange, 1)
        exchange.reset_counters()

    return Way(f"hvdlm {name} over {engine}", (torch.float32,), reduce, name in _EXACT)


def _by_mpi(values: Tensor) -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, values.numpy())


def _by_torch(values: Tensor) -> None:
    torch.distributed.all_reduce(values)


def _by_horovod(values: Tensor) -> None:
    import horovod.torch as hvd

    hvd.allreduce_(values, op=hvd.Sum, name=f"benchmark.{values.dtype}.{len(values)}")
