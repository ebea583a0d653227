"""Arithmetic of the forward and backward pass: matrix products in fp32, bf16 or fp16; sums, norms and weights fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_GROWTH_INTERVAL = 1000
_LEAST = 1.0


class LossScale:
    """A factor on the loss that lifts small fp16 gradients above underflow; 1 for ever at other precisions.

    Dynamic (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2): halved when gradients
    overflow, doubled after 1000 steps that did not. Always a power of two, so that it divides out exactly.
    """

    def __init__(self, precision: Precision) -> None:
        self.is_dynamic = precision == "fp16"
        self.factor = 2.0**16 if self.is_dynamic else 1.0
        self._good_steps = 0

    @property
    def is_least(self) -> bool:
        """Whether it can be halved no more."""
        return self.factor <= _LEAST

    def update(self, overflowed: bool) -> float:
        """Learns of one step, every rank the same, and returns by what the factor has been multiplied."""
        before = self.factor
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.factor = max(_LEAST, self.factor / 2)
        elif self.is_dynamic and self._good_steps % _GROWTH_INTERVAL == 0:
            self.factor *= 2
        return self.factor / before

    def tensor(self) -> Tensor:
        """The factor and the good steps since it changed, (2,) float32, for ranks whose scales differ."""
        return torch.tensor([self.factor, self._good_steps], dtype=torch.float32)

    def load_tensor(self, state: Tensor) -> None:
        """Restores what `tensor` has returned."""
        self.factor, self._good_steps = float(state[0]), int(state[1])

    def state_dict(self) -> dict[str, float]:
        return {"is_dynamic": self.is_dynamic, "factor": self.factor, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores a saved scale; ignored if one of the two precisions has a dynamic scale and the other has not."""
        if bool(state["is_dynamic"]) == self.is_dynamic:
            self.factor, self._good_steps = float(state["factor"]), int(state["good_steps"])
