"""Gaussian noise for the sum of clipped gradients: one draw a step, of which each rank adds a part.

A parameter's numbers are cut into blocks, whatever the number of ranks, and the ranks take them in turns. With a seed,
a block is a pure function of seed, step, parameter and block: on any number of ranks the sum has the same noise.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**16  # numbers


class Sharers(NamedTuple):
    """The ranks that share one draw of noise, the whole of which is in the sum of their gradients."""

    rank: int  # of this one among them
    size: int
    of: str = ""  # tells it from the other draws of a step, if there are several


class Noise:
    """Independent numbers of N(0, `deviation`^2)."""

    def __init__(self, deviation: float, seed: int | None) -> None:
        """`seed`: None for random numbers of the operating system, which nobody can draw again."""
        self.deviation, self._seed = deviation, seed

    def add_part_(self, flat: Tensor, step: int, parameter: int, sharers: Sharers) -> None:
        """Adds what is this rank's part of a draw.

        flat: (n,) float32. parameter: its number in the model.
        """
        for number, block in enumerate(flat.split(BLOCK)):
            if (parameter + number) % sharers.size == sharers.rank:
                name = f"{step} {parameter} {number}{sharers.of}"
                block.add_(self._block(len(block), flat.device, name), alpha=self.deviation)

    def _block(self, count: int, device: torch.device, name: str) -> Tensor:
        """(count,) float32 of N(0, 1)."""
        if self._seed is None:
            return _system_normal(count).to(device)
        digest = hashlib.blake2b(f"{self._seed} noise {name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big") % 2**63)
        return torch.randn(count, generator=generator, device=device)


def _system_normal(count: int) -> Tensor:
    """(count,) float32 of N(0, 1), of the operating system's random numbers, by Box and Muller (1958)."""
    pairs = -(-count // 2)
    random = bytearray(os.urandom(12 * pairs))
    words = torch.frombuffer(random, dtype=torch.int64, count=pairs)
    uniform = ((words >> 11) & (2**53 - 1)).double().add_(1).mul_(2.0**-53)  # in (0, 1]: for the tails in fp64
    radius = uniform.log_().mul_(-2).sqrt_().float()
    angle = torch.frombuffer(random, dtype=torch.int32, offset=8 * pairs).float().mul_(math.pi * 2.0**-31)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
