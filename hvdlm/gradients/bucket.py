"""Flat buffers whose views are the parameters' `.grad`, so that a gradient is never copied to be sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


class Bucket:
    """Parameters whose gradients lie one behind the other in `buffer` (float32, 1-D) and travel together."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        total = sum(parameter.numel() for parameter in parameters)
        self.buffer = torch.zeros(total, dtype=torch.float32, device=parameters[0].device)
        start = 0
        for parameter in parameters:
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()

    def holds_its_gradients(self) -> bool:
        """Whether every `.grad` is still a view of the buffer: someone may have set one to None."""
        start = self.buffer.data_ptr()
        end = start + self.nbytes()
        return all(p.grad is not None and start <= p.grad.data_ptr() < end for p in self.parameters)


def make_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[Bucket]:
    """Fills buckets of about `bucket_bytes` with trainable float32 parameters in reverse order.

    Reverse, because the backward pass makes the gradients of the last layers first (Li et al., "PyTorch
    Distributed", VLDB 2020, section 3.2.3): the first bucket is full soonest. A parameter is never cut; one that
    is larger than a bucket has one to itself.
    """
    buckets: list[Bucket] = []
    waiting: list[nn.Parameter] = []
    waiting_bytes = 0
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        nbytes = parameter.numel() * 4
        if waiting and waiting_bytes + nbytes > bucket_bytes:
            buckets.append(Bucket(waiting))
            waiting, waiting_bytes = [], 0
        waiting.append(parameter)
        waiting_bytes += nbytes
    if waiting:
        buckets.append(Bucket(waiting))
    return buckets
