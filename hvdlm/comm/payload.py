"""What an operation has moved, as its caller wants it: tensors of a dtype and a shape, Python objects."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def copy_back(flat: Tensor, tensor: Tensor) -> Tensor:
    """Copies the result into the caller's tensor, unless the operation was in place."""
    target = tensor.detach()
    if flat.data_ptr() != target.data_ptr():
        target.copy_(flat.view(target.shape))
    return tensor


def as_rows(pieces: Sequence[Tensor], lengths: Sequence[int], like: Tensor) -> list[Tensor]:
    """Bytes as tensors on the device of `like`, of its dtype and, but for their `lengths`, of its shape."""
    # a piece may start anywhere, but a view of a wider dtype must be aligned
    aligned = [piece.clone() if piece.storage_offset() % like.element_size() else piece for piece in pieces]
    return [
        piece.to(like.device).view(like.dtype).reshape(length, *like.shape[1:])
        for piece, length in zip(aligned, lengths, strict=True)
    ]


def pickled(value: Any) -> Tensor:
    """As bytes, (n,) uint8."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def unpickled(data: Tensor) -> Any:
    """What `pickled` was given."""
    return pickle.loads(data.numpy().tobytes())
