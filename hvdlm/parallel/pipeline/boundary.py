"""Activations and their gradients between two stages as messages, in fp32 or less."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Boundary = Literal["fp32", "bf16", "int8"]

_SCALE_BYTES = 4
_LARGEST = 127.0


def encode(tensor: Tensor, boundary: Boundary) -> Tensor:
    """(b, T, D) float32 as a contiguous message on its device.

    int8: (b, T, 4 + D) uint8, of each token a float32 scale and D numbers between -127 and 127, rounded to the nearest.
    A number that is not finite makes its token NaN.
    """
    if boundary == "fp32":
        return tensor.float().contiguous()
    if boundary == "bf16":
        return tensor.to(torch.bfloat16).contiguous()
    scales = tensor.abs().amax(dim=-1, keepdim=True).float() / _LARGEST  # (b, T, 1)
    numbers = torch.where(scales > 0, tensor / scales, 0.0).round_().clamp_(-_LARGEST, _LARGEST)
    numbers = numbers.nan_to_num_(0.0).to(torch.int8)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], dim=-1)


def empty_message(shape: tuple[int, int, int], boundary: Boundary, device: torch.device) -> Tensor:
    """Room for what `encode` makes of a tensor of `shape`."""
    if boundary == "int8":
        batch, length, width = shape
        return torch.empty(batch, length, _SCALE_BYTES + width, dtype=torch.uint8, device=device)
    return torch.empty(shape, dtype=torch.float32 if boundary == "fp32" else torch.bfloat16, device=device)


def decode(message: Tensor, boundary: Boundary) -> Tensor:
    """(b, T, D) float32 of what `encode` has made."""
    if boundary != "int8":
        return message.float()
    scales, numbers = message[..., :_SCALE_BYTES].contiguous(), message[..., _SCALE_BYTES:].contiguous()
    return numbers.view(torch.int8).float() * scales.view(torch.float32)
