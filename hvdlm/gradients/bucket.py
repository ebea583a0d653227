"""Flat buffers whose views are the parameters' `.grad`, so that gradients are added, sent and used where they lie.

A step's first gradient of a parameter is made elsewhere by autograd, and copied into its place while it is in the
cache: that is one pass over the buffer, where clearing it and adding to it would be three.
"""

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
        self._places = self.cut(self.buffer)
        self._is_made = [False] * len(self.parameters)
        for parameter, place in zip(self.parameters, self._places, strict=True):
            parameter.grad = place

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor as long as `buffer`, one a parameter, each of its parameter's shape."""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()

    def clear(self) -> None:
        """From here on there are no gradients: `.grad` is None until one is made."""
        self._is_made = [False] * len(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None

    def take(self, index: int) -> None:
        """Autograd has made a gradient of parameter `index`, or added one to what lies in the buffer."""
        parameter, place = self.parameters[index], self._places[index]
        if parameter.grad is not place and parameter.grad is not None:
            place.copy_(parameter.grad)
            parameter.grad = place
        self._is_made[index] = True

    def complete(self) -> None:
        """Gradients that nothing has made are zero; those that were set by hand are taken too."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.take(index)
            elif not self._is_made[index]:
                parameter.grad = self._places[index].zero_()

    def holds_its_gradients(self) -> bool:
        """Whether every `.grad` is its view of the buffer: someone may have set one to None after it was made."""
        return all(p.grad is place for p, place in zip(self.parameters, self._places, strict=True))


def make_buckets(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[Bucket]:
    """Buckets of about `bucket_bytes`, as `divide` says."""
    return [Bucket(group) for group in divide(parameters, bucket_bytes)]


def divide(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[dict[str, nn.Parameter]]:
    """Groups of trainable float32 parameters, in reverse order, whose gradients take about `bucket_bytes`.

    Reverse, because the backward pass makes the gradients of the last layers first (Li et al., "PyTorch
    Distributed", VLDB 2020, section 3.2.3): the first bucket is full soonest. A parameter is never cut; one that
    is larger than a bucket has one to itself.
    """
    groups: list[dict[str, nn.Parameter]] = []
    waiting: dict[str, nn.Parameter] = {}
    waiting_bytes = 0
    for name, parameter in reversed([(name, p) for name, p in parameters.items() if p.requires_grad]):
        nbytes = parameter.numel() * 4
        if waiting and waiting_bytes + nbytes > bucket_bytes:
            groups.append(waiting)
            waiting, waiting_bytes = {}, 0
        waiting[name] = parameter
        waiting_bytes += nbytes
    if waiting:
        groups.append(waiting)
    return groups
