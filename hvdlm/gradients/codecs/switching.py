"""Codec `auto`: a codec that can become another between two steps, without losing what is owed."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.choice import codec_maker
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange

_RESIDUAL = "residual"


class Switching(Codec):
    """Does what the codec called `name` does; chooser.py measures, and changes it."""

    def __init__(self, name: str, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self.name = name
        self._codec = codec_maker(name)(bucket, settings)
        self._owed: Tensor | None = None  # by a codec that has gone; goes with the next gradients

    def become(self, name: str) -> None:
        """Travels by the codec called `name` from the next step on."""
        if name == self.name:
            return
        owed = self.state()[_RESIDUAL]
        self.name, self._codec, self._owed = name, codec_maker(name)(self.bucket, self.settings), owed
        residual = self._codec.state().get(_RESIDUAL)
        if residual is not None:
            residual.copy_(owed)
            self._owed = None

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if self._owed is not None:
            gradients.add_(self._owed)
            if self._owed.is_cuda:  # its memory is not to be given away while the communication stream reads it
                self._owed.record_stream(torch.cuda.current_stream())
            self._owed = None
        self._codec.reduce_(gradients, exchange, step)

    def state(self) -> dict[str, Tensor]:
        """That of the codec; and always a residual, so that a checkpoint has room for one."""
        state = self._codec.state()
        if _RESIDUAL not in state:
            if self._owed is None:
                self._owed = torch.zeros_like(self.bucket.buffer)
            state = {**state, _RESIDUAL: self._owed}
        return state

    def further_state(self) -> dict[str, Tensor]:
        return self._codec.further_state()
