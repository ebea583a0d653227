"""A rank's part of a batch, in parts that are computed one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.data.loader import Batch
from hvdlm.targets import IGNORE

MicroBatch = tuple[Tensor, Tensor]  # inputs and targets, (b, T) int64 each


def divide(batch: Batch, size: int, device: torch.device, least: int = 0) -> list[MicroBatch]:
    """Micro-batches of at most `size` sequences on `device`; none if the batch is empty.

    `least`: how many there are to be. Where others have more, further ones have a sequence of which nothing counts.
    """
    inputs, targets = (tensor.to(device, non_blocking=True) for tensor in (batch.inputs, batch.targets))
    own = list(zip(inputs.split(size), targets.split(size), strict=True)) if len(inputs) else []
    if len(own) < least:
        empty = torch.zeros((1, inputs.shape[1]), dtype=torch.int64, device=device)
        own += [(empty, torch.full_like(empty, IGNORE))] * (least - len(own))
    return own
