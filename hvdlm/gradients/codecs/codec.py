"""What a codec is: how the gradients of one bucket travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hvdlm.config import CompressionSection
    from hvdlm.gradients.bucket import Bucket
    from hvdlm.gradients.exchange import Exchange


class Codec(ABC):
    """One object a bucket, on every rank. A codec of your own derives from this: see examples/custom_codec.

    All ranks call `reduce_` for the same buckets in the same order, on the communication thread or stream of each,
    while the backward pass goes on with the parameters of later buckets.
    """

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        """`bucket`: its parameters' names and shapes, and the flat buffer of their gradients."""
        self.bucket = bucket
        self.settings = settings

    @abstractmethod
    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        """Replaces `gradients` (float32, 1-D: the bucket's buffer) by what this codec delivers of their sum.

        The result is equal bit for bit on all ranks. `step`: the number of this optimizer step, from 0.
        """

    def state(self) -> dict[str, Tensor]:
        """What is to be kept for the next step, flat and as long as the bucket's buffer, by name.

        Checkpoints keep it for each rank. When a run goes on with another number of ranks, each gets an equal part
        of the sum over the old ones: so nothing that was owed is lost.
        """
        return {}

    def further_state(self) -> dict[str, Tensor]:
        """More of the kind of `state`, in tensors of any shape, by names that no other bucket has."""
        return {}
