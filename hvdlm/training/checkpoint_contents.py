"""What a checkpoint holds, for whoever reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hvdlm.errors import HvdlmError

TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
RANKS = "ranks"


class RemovedCheckpointError(HvdlmError):
    """A checkpoint was there, and its job has removed it since."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified. Reading it raises RemovedCheckpointError if it is not there any more."""

    path: Path

    @property
    def state(self) -> dict[str, Any]:
        """Step, data position, loss scale, settings, world size, fingerprint of the data, versions."""
        with self._noticing_removal():
            state: dict[str, Any] = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        return state

    def model(self) -> dict[str, Tensor]:
        """Parameters by name, float32, on the CPU. Raises HvdlmError if some are NaN or infinite."""
        with self._noticing_removal():
            tensors = safetensors.torch.load_file(self.path / "model.safetensors")
        self._check_finite(tensors)
        return tensors

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state by name, on the CPU."""
        with self._noticing_removal():
            return safetensors.torch.load_file(self.path / "optimizer.safetensors")

    def names(self) -> set[str]:
        """Of all parameters and state that are equal on all ranks, or of which each rank has a part."""
        found: set[str] = set()
        for file in TENSOR_FILES:
            with self._noticing_removal(), safetensors.safe_open(self.path / file, "pt") as opened:
                found.update(opened.keys())
        return found

    def tensor(self, name: str) -> Tensor:
        """One of `names`, on the CPU. Raises HvdlmError if it is a parameter that holds NaN or infinite numbers."""
        for file in TENSOR_FILES:
            with self._noticing_removal(), safetensors.safe_open(self.path / file, "pt") as opened:
                if name in opened.keys():  # noqa: SIM118  not a dictionary
                    found: Tensor = opened.get_tensor(name)
                    if file == TENSOR_FILES[0]:
                        self._check_finite({name: found})
                    return found
        raise KeyError(name)

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        """The tensors of that rank alone, on the CPU; none if ranks did not differ."""
        file = self.path / RANKS / rank_file_name(rank)
        return safetensors.torch.load_file(file) if file.exists() else {}

    def bytes(self) -> int:
        """Of all its files."""
        with self._noticing_removal():
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def _check_finite(self, parameters: Mapping[str, Tensor]) -> None:
        if name := not_finite(parameters):
            raise HvdlmError(
                f"checkpoint {self.path} is of no use: {name} holds NaN or infinite numbers; take an earlier one"
            )

    @contextmanager
    def _noticing_removal(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise RemovedCheckpointError(
                f"checkpoint {self.path} was removed while it was read: take a newer one, or raise checkpoint.keep"
            ) from None


def rank_file_name(rank: int) -> str:
    """Of the file of what one rank has of its own."""
    return f"rank_{rank:05d}.safetensors"


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number, or None."""
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
