"""What a codec is: how the gradients of one bucket are sent; and its residual, for error feedback.

Error feedback: what was not delivered at one step, the residual, is added to the gradients of the next (Seide et al.,
"1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019,
algorithm 2). Without it whatever a codec drops is lost, and a biased codec trains another model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdlm.arrays import as_array

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

    def reduce_to_owners_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        """The first half of `reduce_`: replaces this rank's part of `gradients`, of which each rank has as many, by
        what is delivered of the sum there. What is elsewhere then means nothing.

        A codec that has no such half is refused with parallel.shard.
        """
        raise NotImplementedError

    def messages_to_owners(self, gradients: Tensor, owners: int, step: int) -> list[Tensor]:
        """What a rank that owns nothing sends to each of some ranks that own as many of `gradients`: uint8.

        They call `add_message_` with the same `step`. A codec that has no such messages is refused with server.ranks.
        """
        raise NotImplementedError

    @property
    def has_messages_to_owners(self) -> bool:
        """Whether there are any."""
        return type(self).messages_to_owners is not Codec.messages_to_owners

    def add_message_(self, message: Tensor, own: Tensor, owner: int, owners: int, step: int) -> None:
        """Adds what one rank has sent of the part of `owner`, which is `own`, by `messages_to_owners`."""
        raise NotImplementedError

    def can_take_back(self, gradients: Tensor) -> bool:
        """Whether `take_back_` undoes `reduce_to_owners_` and `messages_to_owners`."""
        return False

    def take_back_(self, gradients: Tensor, rank: int) -> None:
        """What is kept is what it was before `reduce_to_owners_`. `gradients`: as that has left them, but for the part
        of this rank, `rank` of those that own parts.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What is kept for the next step, by name: tensors that are flat and as long as the bucket's buffer.

        Checkpoints save it for each rank. When a run is resumed on another number of ranks, each gets an equal part of
        the sum over the old ones, so that no residual is lost.
        """
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Further state in tensors of any shape, by names that no other bucket has."""
        return {}


class Residual:
    """What this rank has not delivered of the gradients of a bucket: intended minus delivered."""

    def __init__(self, bucket: Bucket, is_kept: bool) -> None:
        """`is_kept`: False turns error feedback off."""
        self.values = torch.zeros_like(bucket.buffer) if is_kept else None

    def add_to_(self, gradients: Tensor) -> None:
        """Adds the residual to `gradients`, which are then all that should be delivered."""
        if self.values is not None:
            gradients.add_(self.values)

    def update(self, intended: Tensor, delivered: Callable[[], Tensor]) -> None:
        """Sets the residual to the difference; `delivered` is called only if a residual is kept."""
        if self.values is not None:
            torch.sub(intended, delivered(), out=self.values)

    def state(self) -> dict[str, Tensor]:
        return {} if self.values is None else {"residual": self.values}


def uses_loops(values: Tensor) -> bool:
    """Whether loops compiled for the CPU do the work on `values`.

    Elsewhere PyTorch operations do, and nothing is decided by a number that lies there: reading one would make the host
    wait for the device.
    """
    return values.is_cpu


def reduce_dense_(gradients: Tensor, residual: Tensor, exchange: Exchange) -> None:
    """Replaces `gradients` by their dense sum, to which this rank adds its whole `residual`.

    Where the residual is zero, the result is the dense sum, on a CPU bit for bit. Afterwards it is zero, unless the sum
    is not finite.
    """
    if not uses_loops(gradients):
        gradients.add_(residual)
        exchange.all_reduce_(gradients)
        residual.copy_(torch.where(gradients.isfinite().all(), torch.zeros_like(residual), residual))
        return
    has_residual = bool(as_array(residual).any())  # NumPy's takes a fifth of the time of PyTorch's
    if has_residual:
        gradients.add_(residual)
    exchange.all_reduce_(gradients)
    if has_residual and gradients.isfinite().all():
        residual.zero_()


def dense_messages_(gradients: Tensor, residual: Tensor, owners: int) -> list[Tensor]:
    """For `Codec.messages_to_owners`: all of `gradients`, to which `residual` is added, as float32. The residual is
    then zero, and what it was is in `gradients`.
    """
    intended = gradients + residual
    gradients.copy_(residual)
    residual.zero_()
    return [part.view(torch.uint8) for part in intended.split(len(gradients) // owners)]


def add_dense_message_(message: Tensor, own: Tensor) -> None:
    """For `Codec.add_message_`: adds what `dense_messages_` has made for this owner."""
    own.add_(message.view(torch.float32))
