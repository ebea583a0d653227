"""Codec `none`: gradients are summed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.gradients.codecs.codec import Codec, add_dense_message_
from hvdlm.gradients.exchange import Exchange


class Dense(Codec):
    """The dense sum. Where the engine sums faster than the ring, GradientSync calls the engine directly."""

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        exchange.all_reduce_(gradients)

    def reduce_to_owners_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        exchange.reduce_scatter_(gradients)

    def messages_to_owners(self, gradients: Tensor, owners: int, step: int) -> list[Tensor]:
        return [part.view(torch.uint8) for part in gradients.split(len(gradients) // owners)]

    def add_message_(self, message: Tensor, own: Tensor, owner: int, owners: int, step: int) -> None:
        add_dense_message_(message, own)
