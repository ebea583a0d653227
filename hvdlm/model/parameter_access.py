"""Where a model reads its parameters, for models whose parameters are elsewhere in between."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# A part of a model that reads parameters: a block, by number, or one of these
Part = int | str
EMBEDDING, OUTPUT = "embedding", "output"


class ParameterAccess(Protocol):
    """Is told where a model reads its parameters, in case they are elsewhere in between."""

    def before(self, part: Part, x: Tensor) -> Tensor:
        """Before the forward pass of a part, with its input, which it returns; OUTPUT ends with the loss."""

    def after(self, part: Part, x: Tensor) -> Tensor:
        """After the forward pass of a part, with what it returns. Not called for OUTPUT."""
