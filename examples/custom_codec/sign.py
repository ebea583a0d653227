"""A codec of one's own: one bit a number, its sign, with error feedback (Karimireddy et al., ICML 2019, algorithm 1).

hvdlm train CONFIG --compression.codec examples/custom_codec/sign.py:Sign
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange


class Sign(Codec):
    """Sends the mean magnitude of each parameter's gradient, and the sign of each of its numbers. On CPUs."""

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self.residual = torch.zeros_like(bucket.buffer)

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        intended = gradients + self.residual if self.settings.error_feedback else gradients.clone()
        scales = torch.stack([piece.abs().mean() for piece in self.bucket.split(intended)])
        signs = torch.from_numpy(np.packbits(intended.numpy() > 0))
        gradients.zero_()
        for arrived in zip(exchange.all_gather(scales), exchange.all_gather(signs), strict=True):
            gradients.add_(self._decode(*arrived))  # in the order of ranks, so that all add up alike
        if gradients.isfinite().all():
            torch.sub(intended, self._decode(scales, signs), out=self.residual)

    def _decode(self, scales: Tensor, signs: Tensor) -> Tensor:
        bits = np.unpackbits(signs.numpy(), count=self.residual.numel())
        values = torch.from_numpy(bits).float().mul_(2).sub_(1)
        for piece, scale in zip(self.bucket.split(values), scales, strict=True):
            piece.mul_(scale)
        return values

    def state(self) -> dict[str, Tensor]:
        return {"residual": self.residual} if self.settings.error_feedback else {}
