"""Codec `none`: gradients travel as they are."""

from __future__ import annotations

from torch import Tensor

from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange


class Dense(Codec):
    """The plain sum in float32; where the engine makes it, GradientSync leaves it to the engine."""

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        exchange.all_reduce_(gradients)
