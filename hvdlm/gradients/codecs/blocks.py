"""How a bucket is cut: its matrices into blocks, and blocks into parts of which each rank owns one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import part_lengths
from hvdlm.gradients.bucket import Bucket

# A place within a block travels as one byte.
LONGEST_BLOCK = 256

# Elements of a tensor that is small: choosing among them would save next to nothing.
_SMALL = 4096


def is_large_matrix(parameter: nn.Parameter) -> bool:
    """Whether it is worth compressing: biases, normalisation weights and small tensors are not."""
    return parameter.dim() >= 2 and parameter.numel() > _SMALL


class Part(NamedTuple):
    """Consecutive blocks of a bucket, and some of its elements that are in no block."""

    block: int  # numbers in a block, but for the last of a span, which may have fewer
    spans: Tensor  # (n, 2) int64, on the CPU: start and stop in the buffer; blocks follow one another from each start
    dense: Tensor  # (m,) int64: where in the buffer elements lie that travel as they are

    def entries(self, kept: int) -> int:
        """Numbers chosen where each block gives its `kept` largest, or all it has."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return int((lengths // self.block * min(kept, self.block) + (lengths % self.block).clamp(max=kept)).sum())

    def stretches(self) -> Iterator[tuple[int, int, int]]:
        """Start, stop and block length of what lies in the buffer in blocks of one length, in the order of blocks."""
        for start, stop in self.spans.tolist():
            whole = stop - (stop - start) % self.block
            for first, end, length in ((start, whole, self.block), (whole, stop, stop - whole)):
                if first < end:
                    yield first, end, length


def cut_into_parts(bucket: Bucket, block: int, count: int) -> list[Part]:
    """Cuts `bucket` into `count` parts of as many blocks each; the last ones may have fewer, or none."""
    compressed: list[tuple[int, int]] = []
    dense: list[tuple[int, int]] = []
    start = 0
    for parameter in bucket.parameters:
        stop = start + parameter.numel()
        (compressed if is_large_matrix(parameter) else dense).append((start, stop))
        start = stop

    blocks_a_part = -(-sum(-(-(stop - start) // block) for start, stop in compressed) // count)
    spans: list[list[tuple[int, int]]] = [[]]
    room = blocks_a_part
    for start, stop in compressed:
        while start < stop:
            if room == 0:
                spans.append([])
                room = blocks_a_part
            end = min(stop, start + room * block)
            spans[-1].append((start, end))
            room -= -(-(end - start) // block)
            start = end
    spans += [[] for _ in range(count - len(spans))]

    places = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*span) for span in dense)])
    pieces = places.to(bucket.buffer.device).split(part_lengths(len(places), count))
    return [
        Part(block, torch.tensor(own, dtype=torch.int64).reshape(-1, 2), piece)
        for own, piece in zip(spans, pieces, strict=True)
    ]
