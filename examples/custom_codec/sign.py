"""An example of a codec: sends one bit for each gradient, its sign, with error feedback.

Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes" (ICML 2019), algorithm 1.

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
    """Sends the mean absolute value of each parameter's gradient and the sign of each of its elements. CPU only."""

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self.residual = torch.zeros_like(bucket.buffer)

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        corrected = gradients + self.residual if self.settings.error_feedback else gradients.clone()
        scales = torch.stack([part.abs().mean() for part in self.bucket.split(corrected)])
        signs = torch.from_numpy(np.packbits(corrected.numpy() > 0))
        gradients.zero_()
        for received in zip(exchange.all_gather(scales), exchange.all_gather(signs), strict=True):
            gradients.add_(self._decode(*received))  # in the order of ranks, so that the sums are bitwise identical
        if gradients.isfinite().all():  # after an overflow the residual stays as it was
            torch.sub(corrected, self._decode(scales, signs), out=self.residual)

    def _decode(self, scales: Tensor, signs: Tensor) -> Tensor:
        """The gradients that a rank has sent, as float32. `scales`: one for each parameter; `signs`: packed bits."""
        bits = np.unpackbits(signs.numpy(), count=self.residual.numel())
        values = torch.from_numpy(bits).float().mul_(2).sub_(1)
        for part, scale in zip(self.bucket.split(values), scales, strict=True):
            part.mul_(scale)
        return values

    def state(self) -> dict[str, Tensor]:
        return {"residual": self.residual} if self.settings.error_feedback else {}
