"""A codec that can be replaced by another between two steps, without losing its residual.

For `auto`, and for a hierarchical job that finds a single node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import codec_factory
from hvdlm.gradients.exchange import Exchange

_RESIDUAL = "residual"


class SwitchableCodec(Codec):
    """Wraps the codec called `name`; tuner.py decides when it is switched."""

    def __init__(self, name: str, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self.name = name
        self._codec = codec_factory(name)(bucket, settings)
        # Of the codec before, if this one keeps none: it is added to the next step's gradients
        self._left_residual: Tensor | None = None

    def switch_to(self, name: str) -> None:
        """Uses the codec called `name` from the next step on."""
        if name == self.name:
            return
        residual = self.state()[_RESIDUAL]
        self.name, self._codec, self._left_residual = name, codec_factory(name)(self.bucket, self.settings), residual
        own_residual = self._codec.state().get(_RESIDUAL)
        if own_residual is not None:
            own_residual.copy_(residual)
            self._left_residual = None

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if self._left_residual is not None:
            gradients.add_(self._left_residual)
            if self._left_residual.is_cuda:  # its memory must not be reused while the communication stream reads it
                self._left_residual.record_stream(torch.cuda.current_stream())
            self._left_residual = None
        self._codec.reduce_(gradients, exchange, step)

    def state(self) -> dict[str, Tensor]:
        """The state of the codec, and always a residual, so that one can be restored from a checkpoint."""
        state = self._codec.state()
        if _RESIDUAL not in state:
            if self._left_residual is None:
                self._left_residual = torch.zeros_like(self.bucket.buffer)
            state = {**state, _RESIDUAL: self._left_residual}
        return state

    def extra_state(self) -> dict[str, Tensor]:
        return self._codec.extra_state()
