"""Flat buffers whose views are the parameters' `.grad`, so that a gradient is never copied to be sent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Bucket:
    """Parameters whose gradients lie one behind the other in `buffer` (float32, 1-D) and travel together."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """`parameters` by name; their gradients lie in `buffer` in this order."""
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        total = sum(parameter.numel() for parameter in self.parameters)
        self.buffer = torch.zeros(total, dtype=torch.float32, device=self.parameters[0].device)
        for parameter, gradient in zip(self.parameters, self.cut(self.buffer), strict=True):
            parameter.grad = gradient

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor as long as `buffer`, one a parameter, each of its parameter's shape."""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()

    def holds_its_gradients(self) -> bool:
        """Whether every `.grad` is still a view of the buffer: someone may have set one to None."""
        start = self.buffer.data_ptr()
        end = start + self.nbytes()
        return all(p.grad is not None and start <= p.grad.data_ptr() < end for p in self.parameters)


def make_buckets(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[Bucket]:
    """Fills buckets of about `bucket_bytes` with trainable float32 parameters in reverse order.

    Reverse, because the backward pass makes the gradients of the last layers first (Li et al., "PyTorch
    Distributed", VLDB 2020, section 3.2.3): the first bucket is full soonest. A parameter is never cut; one that
    is larger than a bucket has one to itself.
    """
    buckets: list[Bucket] = []
    waiting: dict[str, nn.Parameter] = {}
    waiting_bytes = 0
    for name, parameter in reversed([(name, p) for name, p in parameters.items() if p.requires_grad]):
        nbytes = parameter.numel() * 4
        if waiting and waiting_bytes + nbytes > bucket_bytes:
            buckets.append(Bucket(waiting))
            waiting, waiting_bytes = {}, 0
        waiting[name] = parameter
        waiting_bytes += nbytes
    if waiting:
        buckets.append(Bucket(waiting))
    return buckets
