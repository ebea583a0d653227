"""How a bucket is cut for top-k: matrices into blocks, the blocks into parts, and small tensors into none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import part_lengths
from hvdlm.gradients.bucket import Bucket

# A place within a block travels as one byte.
LONGEST_BLOCK = 256

# Tensors below this many elements travel as they are: choosing among them would save next to nothing.
_SMALL = 4096


def is_compressed(parameter: nn.Parameter) -> bool:
    """Whether it is a matrix of some size; biases, normalisation weights and small tensors travel as they are."""
    return parameter.dim() >= 2 and parameter.numel() >= _SMALL


class Part(NamedTuple):
    """Consecutive blocks of a bucket, and some of its elements that are in no block."""

    spans: Tensor  # (n, 2) int64, on the CPU: starts and stops in the buffer; blocks begin at each start
    dense: Tensor  # (m,) int64: places in the buffer of elements that travel as they are

    def entries(self, block: int, kept: int) -> int:
        """How many elements are chosen, `kept` of each `block`; the last block of a span may be short."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        chosen = lengths // block * min(kept, block) + (lengths % block).clamp(max=kept)
        return int(chosen.sum())


def cut_into_parts(bucket: Bucket, block: int, parts: int) -> list[Part]:
    """Cuts `bucket` into `parts` of equal numbers of blocks, but for the last ones, which may have fewer or none."""
    spans, dense, start = [], [], 0
    for parameter in bucket.parameters:
        stop = start + parameter.numel()
        (spans if is_compressed(parameter) else dense).append((start, stop))
        start = stop
    starts = torch.tensor([first for span in spans for first in range(*span, block)], dtype=torch.int64)
    stops = torch.tensor([min(at + block, span[1]) for span in spans for at in range(*span, block)], dtype=torch.int64)
    places = torch.cat([torch.arange(*span) for span in dense] or [starts[:0]]).to(bucket.buffer.device)
    at_once = max(-(-len(starts) // parts), 1)
    pieces = places.split(part_lengths(len(places), parts))
    return [
        Part(_joined(starts[at : at + at_once], stops[at : at + at_once]), piece)
        for at, piece in zip(range(0, parts * at_once, at_once), pieces, strict=True)
    ]


def _joined(starts: Tensor, stops: Tensor) -> Tensor: ...
