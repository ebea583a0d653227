"""Measures the cost of a codec on numbers like those of a bucket, on all ranks at once while nothing else runs."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.auto.forecast import Cost
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.timing import Timestamp

_REPETITIONS = 5
_LONGEST = 0.5  # seconds that the repetitions may take together, on a slow link

_BUSY_SECONDS = 0.02  # of computing on two threads, to see whether they share a core


def probe_codec_on_channel(channel: Channel, codec: Codec, buffer: Tensor, step: int, name: str) -> Cost:
    """`probe_codec` of what `channel` does to numbers like those of `buffer` by `codec`; `name`: of its spans.

    Collective over the ranks of the channel.
    """

    def reduce(values: Tensor) -> float:
        before = channel.codec_seconds
        channel.reduce_(codec, values, step, name)
        return channel.codec_seconds - before

    return probe_codec(channel.communicator, buffer, reduce)


def probe_codec(communicator: Communicator, buffer: Tensor, reduce: Callable[[Tensor], float]) -> Cost:
    """The median cost of a few repetitions, of the slowest rank; equal on all ranks. Collective.

    `buffer`: gives shape and device of the numbers that are reduced, and is not changed. `reduce`: reduces them, and
    returns the seconds of it that were spent on encoding and decoding.
    """
    # A generator of its own: what the training draws does not depend on how often this is called
    generator = torch.Generator(buffer.device).manual_seed(communicator.rank)
    gradients = torch.randn(buffer.shape, generator=generator, device=buffer.device)
    values = torch.empty_like(gradients)
    costs: list[Cost] = []
    for repetition in range(-1, _REPETITIONS):  # the first repetition warms up
        if sum(map(sum, costs)) > _LONGEST:
            break
        values.copy_(gradients)
        communicator.barrier()
        begin = Timestamp(buffer.device)
        computing = reduce(values)
        seconds = Timestamp(buffer.device) - begin
        by_rank = communicator.all_gather_object((computing, seconds))
        slowest = max(each[1] for each in by_rank)
        computing = min(slowest, max(each[0] for each in by_rank))
        if repetition >= 0 or slowest > _LONGEST:
            costs.append(Cost(computing, slowest - computing))
    return Cost(*(statistics.median(parts) for parts in zip(*costs, strict=True)))


def threads_share_core(communicator: Communicator) -> bool:
    """Whether on some rank a second thread slows down the first: it has no core of its own. Collective."""
    values = torch.ones(4096)

    def compute() -> int:
        count, end = 0, time.perf_counter() + _BUSY_SECONDS
        while time.perf_counter() < end:
            for _ in range(50):
                values.mul_(1.0)
            count += 1
        return count

    def compute_beside_another() -> int:
        other = threading.Thread(target=compute)
        other.start()
        count = compute()
        other.join()
        return count

    communicator.barrier()
    alone = compute()
    communicator.barrier()
    return any(communicator.all_gather_object(compute_beside_another() < 0.7 * alone))
