"""Tensors on the CPU as NumPy arrays over the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = {
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.uint8: "|u1",
}


class _Memory:
    """Of a tensor, which lives as long as arrays over it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "typestr": _TYPES[tensor.dtype],
            "data": (tensor.data_ptr(), False),
        }


def as_array(tensor: Tensor) -> NDArray[Any]:
    """`tensor` (contiguous, on the CPU) as an array. `Tensor.numpy` would fix the size of its storage for ever (PyTorch
    2.13), and what is sent is often freed and made again: strategies/sharded/.
    """
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(f"a tensor on {tensor.device} of strides {tensor.stride()} is no plain memory of the host")
    return np.asarray(_Memory(tensor.detach()))
