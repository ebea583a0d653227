"""Flat buffers of numbers that are sent together; of gradients, their views are the parameters' `.grad`, so that
gradients are added, sent and used in place.

Autograd allocates a step's first gradient of a parameter itself. It is copied into its slot of the buffer while it is
in the cache: one pass over the buffer, where clearing the buffer and adding to it would be three.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Bucket:
    """Parameters of each of which as many numbers lie in `buffer` (float32, 1-D), one behind the other."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """`parameters` by name; their numbers lie in `buffer` in this order."""
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        total = sum(parameter.numel() for parameter in self.parameters)
        self.buffer = torch.zeros(total, dtype=torch.float32, device=self.parameters[0].device)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a tensor as long as `buffer`, one for each parameter and of its shape."""
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """`split`, by the names of the parameters."""
        return dict(zip(self.names, self.split(flat), strict=True))

    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()


class GradientBucket(Bucket):
    """Parameters whose `.grad` lie in `buffer`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.pending = len(self.parameters)  # gradients that are not final in this step
        self._slots = self.split(self.buffer)
        self._is_stored = [False] * len(self.parameters)
        for parameter, slot in zip(self.parameters, self._slots, strict=True):
            parameter.grad = slot

    def zero_grad(self) -> None:
        """Sets every `.grad` to None and counts all gradients as pending."""
        self.pending = len(self.parameters)
        self._is_stored = [False] * len(self.parameters)
        for parameter in self.parameters:
            parameter.grad = None

    def store(self, index: int) -> None:
        """Moves the gradient of parameter `index` into its slot, unless autograd has added it there already."""
        parameter, slot = self.parameters[index], self._slots[index]
        if parameter.grad is not slot and parameter.grad is not None:
            slot.copy_(parameter.grad)
            parameter.grad = slot
        self._is_stored[index] = True

    def fill_missing(self) -> None:
        """Stores gradients that were set by hand, and zeros for parameters that got no gradient."""
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.store(index)
            elif not self._is_stored[index]:
                parameter.grad = self._slots[index].zero_()
        self.pending = 0

    def owns_gradients(self) -> bool:
        """Whether every `.grad` is its slot of the buffer: a caller may have set one to None after it was stored."""
        return all(p.grad is slot for p, slot in zip(self.parameters, self._slots, strict=True))


def make_buckets(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[GradientBucket]:
    """Buckets of about `bucket_bytes`, grouped by `group_parameters`."""
    return [GradientBucket(group) for group in group_parameters(parameters, bucket_bytes)]


def bucket_sizes(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[int]:
    """Elements of each bucket that `make_buckets` would make."""
    groups = group_parameters(parameters, bucket_bytes)
    return [sum(parameter.numel() for parameter in group.values()) for group in groups]


def group_parameters(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[dict[str, nn.Parameter]]:
    """Groups of trainable float32 parameters, in reverse order, whose gradients take about `bucket_bytes`.

    Reverse, because the backward pass makes the gradients of the last layers first, so that the first bucket is ready
    soonest (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2.3). A parameter is never split; one that is larger
    than a bucket has a bucket to itself.
    """
    groups: list[dict[str, nn.Parameter]] = []
    group: dict[str, nn.Parameter] = {}
    group_bytes = 0
    for name, parameter in reversed([(name, p) for name, p in parameters.items() if p.requires_grad]):
        nbytes = parameter.numel() * 4
        if group and group_bytes + nbytes > bucket_bytes:
            groups.append(group)
            group, group_bytes = {}, 0
        group[name] = parameter
        group_bytes += nbytes
    if group:
        groups.append(group)
    return groups
