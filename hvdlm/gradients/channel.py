"""A channel to the other ranks: one communication thread, on a GPU with its stream, and a communicator of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hvdlm.comm.algorithm_probe import AlgorithmCost, probe_algorithms
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.ring import Ring
from hvdlm.comm.work import Work
from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.hierarchy import Hierarchy
from hvdlm.timing import Span, total_seconds


class Channel:
    """Sums buckets over all ranks by a codec, one at a time, in the order in which they are submitted."""

    def __init__(
        self,
        communicator: Communicator,
        hierarchy: Hierarchy | None,
        exchange: Exchange,
        device: torch.device,
        owns_communicator: bool,
    ) -> None:
        """`communicator`: all ranks. `exchange`: they or leaders. `owns_communicator`: it was split off for this."""
        self.communicator, self.hierarchy, self.exchange = communicator, hierarchy, exchange
        self._owns_communicator = owns_communicator
        self.spans: list[Span] = []  # of codecs at work, exchange included, since `reset_counters`
        self.earlier_spans: list[Span] = []  # these and the exchange's, before that reset
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A thread begins with GPU 0: what it allocates there, pinned memory too, would cost that GPU a context a rank
        begin = None if self._stream is None else partial(torch.cuda.set_device, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hvdlm-gradients", initializer=begin)

    def close(self) -> None:
        """Ends the thread once it has done what was submitted, then closes the groups of ranks that were split off for
        this channel. Collective.
        """
        self._thread.shutdown()
        if self.hierarchy is not None:
            self.hierarchy.close()
        if self._owns_communicator:
            self.communicator.close()

    def abandon(self) -> None:
        """Ends the thread, whose operations have been revoked. Not collective; a second call does nothing."""
        self._thread.shutdown(cancel_futures=True)

    def reset_counters(self) -> None:
        """Counts bytes and seconds from zero."""
        self.earlier_spans = [*self.spans, *self.exchange.spans]
        self.exchange.reset_counters()
        self.spans = []

    @property
    def last_spans(self) -> list[Span]:
        """Codecs at work and the exchanges within them, of the step under way and the one before."""
        return [*self.earlier_spans, *self.spans, *self.exchange.spans]

    @property
    def codec_seconds(self) -> float:
        """Seconds of encoding and decoding, without the exchange."""
        return total_seconds(self.spans) - self.exchange.seconds

    def submit(self, codec: Codec, gradients: Tensor, step: int, name: str) -> Work[None]:
        """Queues `reduce_` for the communication thread.

        On a GPU it is ordered after what the current stream has been given so far, and the stream that is current in
        `wait` is ordered after it.
        """
        return self.run(partial(self.reduce_, codec, gradients, step, name))

    def run(self, task: Callable[[], None]) -> Work[None]:
        """Queues a task of another kind, ordered like `submit`'s."""
        stream = self._stream
        if stream is None:
            return Work(self._thread.submit(task).result)
        ready, finished = torch.cuda.Event(), torch.cuda.Event()
        ready.record()

        def run_on_stream() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                task()
                finished.record(stream)

        future = self._thread.submit(run_on_stream)

        def finish() -> None:
            future.result()
            torch.cuda.current_stream().wait_event(finished)

        return Work(finish)

    def submit_barrier(self) -> Work[None]:
        """Queues a barrier: it ends when all ranks have reduced what was submitted before."""
        return Work(self._thread.submit(self.communicator.barrier).result)

    def reduce_(self, codec: Codec, gradients: Tensor, step: int, name: str) -> None:
        """Replaces `gradients` by their sum over all ranks; `name`: of the span that this takes."""

        def reduce() -> None:
            with self.timed(name):
                codec.reduce_(gradients, self.exchange, step)

        if self.hierarchy is None:
            reduce()
        else:
            self.hierarchy.reduce_(gradients, reduce)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts what happens within as a span of this channel."""
        begin = time.perf_counter()
        yield
        self.spans.append(Span(name, begin, time.perf_counter()))


def open_channels(
    communicator: Communicator,
    device: torch.device,
    comm: CommSection,
    compression: CompressionSection,
    largest: int,
    algorithm_costs: Sequence[AlgorithmCost] = (),
) -> list[Channel]:
    """The channels of a job for gradients on `device`; `largest`: elements of the largest bucket. Collective.

    `algorithm_costs`: what chooses between ring and engine, where that has been measured already.

    Between hosts there are two. A ring leaves its link idle while the last segment of a bucket is passed round; with
    two channels that take buckets in turns the link stays busy. A bucket's sum does not depend on the number of
    channels.
    """
    # Where the engine can split, each channel has a communicator of its own: its messages are then apart from those of
    # the trainer and of other channels. Elsewhere there is one channel, on the trainer's communicator.
    communicators = [communicator]
    if communicator.supports("split"):
        between_hosts = communicator.supports("send") and device.type == "cpu" and communicator.node_count > 1
        communicators = [communicator.split(0, communicator.rank) for _ in range(2 if between_hosts else 1)]
    channels: list[Channel] = []
    for own in communicators:
        hierarchy = Hierarchy(own) if compression.hierarchical and own.node_count > 1 else None
        among = hierarchy.leaders if hierarchy else own
        ring = _make_ring(among, comm.algorithm, device)
        costs = channels[0].exchange.algorithm_costs if channels else algorithm_costs
        takes_part = hierarchy is None or hierarchy.is_leader  # the others send nothing between nodes
        if ring is not None and comm.algorithm == "auto" and not costs and not channels and takes_part:
            costs = probe_algorithms(among, ring, largest)
        channels.append(Channel(own, hierarchy, Exchange(among, ring, costs), device, own is not communicator))
    return channels


def may_sum_by_engine(comm: CommSection, compression: CompressionSection) -> bool:
    """Whether whole gradients may be left to the engine's own all-reduce; other codecs' messages go by the ring, or are
    exchanged without a sum.
    """
    is_summed = compression.codec in ("none", "fp16", "bf16", AUTO) or ":" in compression.codec  # one of the user's own
    return compression.hierarchical or comm.algorithm == "engine" or (comm.algorithm == "auto" and is_summed)


def _make_ring(communicator: Communicator, algorithm: str, device: torch.device) -> Ring | None:
    """The ring, where `comm.algorithm` allows it and the engine has messages for it."""
    if algorithm == "engine" or communicator.size == 1:
        return None
    if communicator.supports("send") and device.type == "cpu":
        return Ring(communicator)
    if algorithm == "ring":
        raise HvdlmError(
            f"comm.algorithm = 'ring' needs gradients on the CPU and point-to-point messages, which engine "
            f"{communicator.engine} does not have here: set it to 'auto'"
        )
    return None
