"""Which part of each parameter a tensor rank holds.

Matrices into attention and into the MLP are divided by rows: whole heads of queries, of keys and of values, and hidden
numbers of the MLP, of SwiGLU's two halves each. Matrices out of them are divided by columns, embeddings by rows, which
are tokens. Norms, biases out of attention and MLP, and position embeddings are held by every rank. Heads have to be a
multiple of the ranks; of anything else the first ranks may have one row or column more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdlm.comm.communicator import part_lengths
from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.model.size import key_value_heads, mlp_width
from hvdlm.model.transformer import without_memory

Region = tuple[slice, ...]
"""Part of a whole parameter: a range of each dimension, with its beginning and its end."""

_VOCABULARY = ("token_embedding.weight", "output.weight")
_DIVIDED_ROWS = (".attention.qkv.", ".mlp.up.")
_DIVIDED_COLUMNS = (".attention.output.weight", ".mlp.down.weight")


def parameter_regions(config: ModelSection, vocab_size: int, rank: int, size: int) -> dict[str, list[Region]]:
    """The regions of each parameter of the whole model, by name, that one of `size` tensor ranks holds.

    Its own parameter is `cut` from the whole one: regions are stacked along the first dimension in the order given. No
    two of a rank have a number in common. Raises HvdlmError for ranks that do not divide the heads.
    """
    if key_value_heads(config) % size:
        raise HvdlmError(
            f"{size} tensor ranks do not divide the {key_value_heads(config)} key and value heads of the model: set "
            "parallel.tensor to a divisor"
        )
    return {
        name: _regions(name, tuple(parameter.shape), config, vocab_size, rank, size)
        for name, parameter in without_memory(config, vocab_size).named_parameters()
    }


def cut(whole: Tensor, regions: Sequence[Region]) -> Tensor:
    """What a rank holds of a whole parameter."""
    return torch.cat([whole[region] for region in regions])


def flat_runs(regions: Sequence[Region], shape: Sequence[int]) -> list[tuple[int, int]]:
    """The numbers of `cut`, in its order, as runs of the flattened whole of a shape: from where to where each."""
    runs = []
    for region in regions:
        columns = region[1] if len(shape) > 1 else slice(0, 1)
        width = shape[1] if len(shape) > 1 else 1
        if columns == slice(0, width):
            runs.append((region[0].start * width, region[0].stop * width))
        else:
            rows = range(region[0].start, region[0].stop)
            runs += [(row * width + columns.start, row * width + columns.stop) for row in rows]
    return runs


def is_divided(name: str) -> bool:
    """Whether each rank has a part only of the parameter of this name; otherwise each has all of it."""
    return _has_divided_rows(name) or name.endswith(_DIVIDED_COLUMNS)


def part(length: int, rank: int, size: int) -> slice:
    """The range of `length` rows or columns that a rank holds."""
    lengths = part_lengths(length, size)
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def _has_divided_rows(name: str) -> bool:
    return name in _VOCABULARY or any(each in name for each in _DIVIDED_ROWS)


def _regions(
    name: str, shape: tuple[int, ...], config: ModelSection, vocab_size: int, rank: int, size: int
) -> list[Region]:
    everything = tuple(slice(0, length) for length in shape)
    if name.endswith(_DIVIDED_COLUMNS):
        return [(everything[0], part(shape[1], rank, size))]
    if not _has_divided_rows(name):
        return [everything]
    regions, start = [], 0
    for length in _rows(name, config, vocab_size):
        own = part(length, rank, size)
        regions.append((slice(start + own.start, start + own.stop), *everything[1:]))
        start += length
    return regions


def _rows(name: str, config: ModelSection, vocab_size: int) -> list[int]:
    """Numbers of consecutive rows, each of which is divided among ranks."""
    if name in _VOCABULARY:
        return [vocab_size]
    if ".attention.qkv." in name:
        key_value_rows = config.width // config.heads * key_value_heads(config)
        return [config.width, key_value_rows, key_value_rows]
    return [mlp_width(config)] * (2 if config.activation == "swiglu" else 1)
