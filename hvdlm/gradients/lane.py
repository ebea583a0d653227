"""A lane to the other ranks: one thread or stream with messages of its own, on which buckets follow one another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, Work
from hvdlm.comm.ring import Ring
from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.courier import Courier
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.nodes import Nodes
from hvdlm.gradients.span import Span, total_seconds
from hvdlm.gradients.trial import Trial, try_algorithms


class Lane:
    """Sums buckets over all ranks by a codec, one at a time, in the order in which they are given.

    A ring leaves its link idle while the last segment of a bucket goes round. Two lanes that take buckets in turns
    keep it busy; what each bucket's sum is does not depend on how many there are.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        comm: CommSection,
        compression: CompressionSection,
        buckets: Sequence[Bucket],
        trials: Sequence[Trial] | None = None,
    ) -> None:
        """`communicator`: of this lane alone. `trials`: another lane's, which need not be made again. Collective."""
        self.nodes = Nodes(communicator) if compression.by_node and communicator.node_count > 1 else None
        among = self.nodes.between if self.nodes else communicator
        self.exchange = _open_exchange(among, comm.algorithm, buckets, trials)
        self.supports_cuda = among.supports("cuda")
        self._courier = Courier(device)
        self.spans: list[Span] = []  # of codecs at work, exchange included, since `clear`

    def clear(self) -> None:
        """Starts counting anew."""
        self.exchange.clear()
        self.spans = []

    @property
    def codec_seconds(self) -> float:
        """Making and reading messages."""
        return total_seconds(self.spans) - self.exchange.seconds

    def submit(self, codec: Codec, gradients: Tensor, step: int, name: str) -> Work[None]:
        """Starts a sum when those before it on this lane have ended."""
        return self._courier.submit(partial(self.reduce_, codec, gradients, step, name))

    def reduce_(self, codec: Codec, gradients: Tensor, step: int, name: str) -> None:
        """Replaces `gradients` by their sum over all ranks; `name`: of the span that this takes."""

        def reduce() -> None:
            begin = time.perf_counter()
            codec.reduce_(gradients, self.exchange, step)
            self.spans.append(Span(name, begin, time.perf_counter()))

        if self.nodes is None:
            reduce()
        else:
            self.nodes.reduce_(gradients, reduce)


def lane_count(communicator: Communicator, device: torch.device) -> int:
    """Two where ranks on several hosts send the messages of a ring; elsewhere there is nothing to keep busy."""
    has_ring = communicator.supports("send") and communicator.supports("split") and device.type == "cpu"
    return 2 if has_ring and communicator.node_count > 1 else 1


def _open_exchange(
    communicator: Communicator, algorithm: str, buckets: Sequence[Bucket], trials: Sequence[Trial] | None
) -> Exchange:
    """Settles what sums: "ring", "engine", or by size ("auto") whichever costs less in a trial. Collective."""
    if algorithm == "engine" or communicator.size == 1:
        return Exchange(communicator, None, [])
    can_ring = communicator.supports("send") and buckets[0].buffer.device.type == "cpu"
    if not can_ring:
        if algorithm == "ring":
            raise HvdlmError(
                f"comm.algorithm = 'ring' needs gradients on the CPU and point-to-point messages, which engine "
                f"{communicator.engine} does not have here: set it to 'auto'"
            )
        return Exchange(communicator, None, [])
    ring = Ring(communicator)
    if algorithm != "auto":
        return Exchange(communicator, ring, [])
    if trials is None:
        trials = try_algorithms(communicator, ring, max(bucket.buffer.numel() for bucket in buckets))
    return Exchange(communicator, ring, trials)
