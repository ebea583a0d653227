"""Files of safetensors that several ranks write together, each its parts of the tensors.

One rank makes the file with its header, in which the places of all numbers stand; then each writes to places of its own
(https://huggingface.co/docs/safetensors, "Format"). Whoever reads the file sees no trace of that.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.strategies.held_parts import Runs, with_positions

_NUMBER = 4  # bytes: all are float32
_ALIGNMENT = 8  # of the first number in the file


def create(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Makes a file of float32 tensors of these shapes, with room for their numbers on the disk. Raises OSError."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _NUMBER * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.flush()
        os.posix_fallocate(stream.fileno(), 0, _ALIGNMENT + len(text) + max(end, 1))
        os.ftruncate(stream.fileno(), _ALIGNMENT + len(text) + end)


def write(path: Path, parts: Mapping[str, tuple[Runs, Tensor]]) -> None:
    """Writes parts of tensors: of each its runs in the flattened tensor, and their numbers, float32 on the CPU, one
    behind the other. Returns when they are on the disk. Raises OSError.
    """
    with path.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(_ALIGNMENT))
        header = json.loads(stream.read(length))
        for name, (runs, numbers) in parts.items():
            begin = _ALIGNMENT + length + header[name]["data_offsets"][0]
            content = as_array(numbers.detach().reshape(-1).contiguous()).data.cast("B")
            for start, stop, position in with_positions(runs):
                own = content[_NUMBER * position : _NUMBER * (position + stop - start)]
                _write_all(stream.fileno(), own, begin + _NUMBER * start)
        os.fsync(stream.fileno())


def _write_all(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def put(whole: Tensor, runs: Runs, numbers: Tensor) -> None:
    """Fills some of a whole tensor, contiguous, from a rank's part."""
    for there, here in _pairs(whole, runs, numbers):
        there.copy_(here)


def take(whole: Tensor, runs: Runs, numbers: Tensor) -> None:
    """Fills a rank's part, contiguous, from the whole tensor."""
    for there, here in _pairs(whole, runs, numbers):
        here.copy_(there)


def _pairs(whole: Tensor, runs: Runs, numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each run: views of it in the whole tensor, and in a rank's part."""
    flat, own = whole.detach().view(-1), numbers.detach().view(-1)
    for start, stop, position in with_positions(runs):
        yield flat[start:stop], own[position : position + stop - start]
