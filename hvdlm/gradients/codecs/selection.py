"""The largest numbers of each block: chosen, and added to where they lie.

Two implementations, equal bit for bit: loops that Numba compiles for the CPU, each one pass over memory, and PyTorch
operations for other devices. Entries come in the order of blocks, and within one the largest magnitude first; among
equal ones, the first in its block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from hvdlm.gradients.codecs.blocks import LONGEST_BLOCK, Part

# Without its sign bit a float32 is ordered by magnitude when read as an integer; NaN stands above infinity.
_MAGNITUDE = 0x7FFFFFFF

# The greatest key (magnitude x 256 + 255 - place) is that of the largest magnitude, where it comes first.
_LAST_PLACE = LONGEST_BLOCK - 1


def choose(part: Part, kept: int, gradients: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the blocks of `gradients` to those of `residual`, and returns the `kept` largest magnitudes of each block.

    These come as values, float32, which `residual` goes on to contain, and uint8 places within their blocks.
    `gradients` gets the old residual, so that all can be undone.
    """
    values = gradients.new_empty(part.entries(kept))
    places = torch.empty_like(values, dtype=torch.uint8)
    if gradients.is_cpu:
        arrays = gradients.numpy(), residual.numpy(), values.numpy(), places.numpy()
        _choose(part.block, part.spans.numpy(), kept, *arrays)
    else:
        choose_with_torch(part, kept, gradients, residual, values, places)
    return values, places


def add_chosen(part: Part, kept: int, values: Tensor, places: Tensor, target: Tensor) -> None:
    """Adds to `target` each of `values` where `choose` has found it."""
    if target.is_cpu:
        _add_chosen(part.block, part.spans.numpy(), kept, values.numpy(), places.numpy(), target.numpy())
    else:
        add_chosen_with_torch(part, kept, values, places, target)


def compile_for_cpu() -> None:
    """Compiles both loops, or loads what an earlier process has compiled, so that no training step has to."""
    part = Part(1, torch.tensor([[0, 1]]), torch.empty(0, dtype=torch.int64))
    values, places = choose(part, 1, torch.zeros(1), torch.zeros(1))
    add_chosen(part, 1, values, places, torch.zeros(1))


@numba.njit(cache=True, nogil=True)  # nogil: the backward pass goes on meanwhile
def _choose(
    block: int,
    spans: np.ndarray,
    kept: int,
    gradients: np.ndarray,
    residual: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
) -> None:
    keys = np.empty(LONGEST_BLOCK, np.int64)
    entry = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            fresh = gradients[start : min(start + block, end)]
            owed = residual[start : min(start + block, end)]
            for place in range(len(owed)):
                intended = np.float32(fresh[place] + owed[place])
                fresh[place] = owed[place]
                owed[place] = intended
                magnitude = np.int64(intended.view(np.int32) & _MAGNITUDE)
                keys[place] = magnitude * LONGEST_BLOCK + _LAST_PLACE - place
            for _ in range(min(kept, len(owed))):
                # Over integers, whose greatest does not depend on the order of comparison: all lanes of a core work
                greatest = np.int64(-1)
                for place in range(len(owed)):
                    greatest = max(greatest, keys[place])
                chosen = _LAST_PLACE - (greatest & _LAST_PLACE)
                keys[chosen] = -1
                values[entry] = owed[chosen]
                places[entry] = chosen
                entry += 1


@numba.njit(cache=True, nogil=True)
def _add_chosen(
    block: int, spans: np.ndarray, kept: int, values: np.ndarray, places: np.ndarray, target: np.ndarray
) -> None:
    entry = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            for _ in range(min(kept, min(start + block, end) - start)):
                target[start + places[entry]] += values[entry]
                entry += 1


def choose_with_torch(
    part: Part, kept: int, gradients: Tensor, residual: Tensor, values: Tensor, places: Tensor
) -> None:
    """`choose` on any device, into `values` and `places`."""
    for start, stop, length, entries in _tables(part, kept):
        fresh, owed = gradients[start:stop], residual[start:stop]
        intended = fresh + owed
        fresh.copy_(owed)
        owed.copy_(intended)
        rows = intended.view(-1, length)  # (blocks, length)
        descending = torch.arange(_LAST_PLACE, _LAST_PLACE - length, -1, device=rows.device)
        keys = (rows.view(torch.int32) & _MAGNITUDE).long() * LONGEST_BLOCK + descending
        chosen = _LAST_PLACE - (keys.topk(min(kept, length), dim=1).values & _LAST_PLACE)
        values[entries] = rows.gather(1, chosen).view(-1)
        places[entries] = chosen.view(-1).to(torch.uint8)


def add_chosen_with_torch(part: Part, kept: int, values: Tensor, places: Tensor, target: Tensor) -> None:
    """`add_chosen` on any device."""
    for start, stop, length, entries in _tables(part, kept):
        rows = target[start:stop].view(-1, length)  # (blocks, length)
        shape = (len(rows), min(kept, length))
        rows.scatter_add_(1, places[entries].view(shape).long(), values[entries].view(shape))


def _tables(part: Part, kept: int) -> Iterator[tuple[int, int, int, slice]]:
    """Stretches of the buffer whose blocks have one length: start, stop, that length, and their entries."""
    entry = 0
    for start, stop, length in part.stretches():
        entries = (stop - start) // length * min(kept, length)
        yield start, stop, length, slice(entry, entry + entries)
        entry += entries
