"""Out of memory, said in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvdlm.errors import HvdlmError


@contextmanager
def out_of_memory_errors(remedy: str) -> Iterator[None]:
    """Turns what PyTorch and Python raise for want of memory into an HvdlmError that ends with `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        # "... you tried to allocate 123 bytes" on a CPU, "... Tried to allocate 1.20 GiB" on a GPU
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        size = f" (it asked for {_readable(asked[1])} more)" if asked else ""
        raise HvdlmError(f"out of memory{size}: {remedy}") from error


def _readable(size: str) -> str:
    number, unit = size.split()
    return f"{int(number) / 2**20:,.0f} MiB" if unit == "bytes" else size
