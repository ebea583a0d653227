"""Codec `none`: gradients are summed in float32."""

from __future__ import annotations

from torch import Tensor

from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange


class Dense(Codec):
    """The dense sum. Where the engine sums faster than the ring, GradientSync calls the engine directly."""

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        exchange.all_reduce_(gradients)

    def reduce_to_owners_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        exchange.reduce_scatter_(gradients)
