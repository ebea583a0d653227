"""Sums gradients over all ranks while the backward pass is still making them.

A gradient's way: `backward()` adds it into its bucket (bucket.py) -> a hook counts it -> the bucket is full ->
its all-reduce starts, on the engine's own thread or stream -> `wait` returns when every bucket holds the sum.
A codec that compresses what travels has its place in `_send`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator, Work
from hvdlm.gradients.bucket import make_buckets
from hvdlm.gradients.stopwatch import Stopwatch


@dataclass
class Traffic:
    """What one step's gradients cost on the wire."""

    dense_bytes: int = 0  # of the gradients themselves
    encoded_bytes: int = 0  # of what stands for them
    wire_bytes: int = 0  # that this rank sends in a ring all-reduce
    first_sent: float = math.nan  # time.perf_counter() when the first bucket left; nan: none has


class GradientSync:
    """Keeps the gradients of a module in buckets and sums them over the ranks of a communicator.

    For each optimizer step:

        sync.begin()
        for each micro-batch: (before the backward pass of the last one: sync.last_micro_batch())
            loss.backward()
        sync.wait()

    A rank without data skips the passes; a parameter that gets no gradient counts as zero. Either way every
    rank sends every bucket, in the order of buckets, so none waits for ever.
    """

    def __init__(self, module: nn.Module, communicator: Communicator, bucket_bytes: int) -> None:
        """Takes over `.grad` of every trainable parameter of `module`; `bucket_bytes`: size of a bucket."""
        self._communicator = communicator
        self.buckets = make_buckets(module.parameters(), bucket_bytes)
        self._missing = [0] * len(self.buckets)  # gradients not made yet, by bucket
        self._under_way: list[Work[Tensor]] = []  # of buckets 0 .. len-1, in their order
        self._is_last_micro_batch = False
        self._waiting = Stopwatch(self.buckets[0].buffer.device)
        self.traffic = Traffic()
        for index, bucket in enumerate(self.buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._counter(index))

    def begin(self) -> None:
        """Clears all gradients and starts counting anew."""
        for index, bucket in enumerate(self.buckets):
            bucket.buffer.zero_()
            self._missing[index] = len(bucket.parameters)
        self._is_last_micro_batch = False
        self.traffic = Traffic()

    def last_micro_batch(self) -> None:
        """From here on a gradient that is made is complete, and full buckets are sent."""
        self._is_last_micro_batch = True

    def wait(self) -> None:
        """Returns when every bucket, on every rank, holds the sum over all ranks."""
        for index in range(len(self._under_way), len(self.buckets)):
            self._send(index)
        self._waiting.start()
        for work in self._under_way:
            work.wait()
        self._waiting.stop()
        self._under_way.clear()

    @property
    def exposed_seconds(self) -> float:
        """How long the last `wait` has waited: communication that no computation hid."""
        return self._waiting.seconds

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a float32 scalar on their device."""
        norms = torch.stack([torch.linalg.vector_norm(bucket.buffer) for bucket in self.buckets])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def scale_(self, factor: float | Tensor) -> None:
        """Multiplies all gradients by a number."""
        for bucket in self.buckets:
            bucket.buffer.mul_(factor)

    def _counter(self, index: int) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            if self._is_last_micro_batch:
                self._missing[index] -= 1
                self._send_what_is_full()

        return count

    def _send_what_is_full(self) -> None:
        """Sends full buckets, but none before its predecessors: all ranks must send in one order."""
        while len(self._under_way) < len(self.buckets) and self._missing[len(self._under_way)] == 0:
            self._send(len(self._under_way))

    def _send(self, index: int) -> None:
        bucket = self.buckets[index]
        if not bucket.holds_its_gradients():
            raise RuntimeError(
                "a .grad no longer lies in its bucket: clear gradients with GradientSync.begin(), not with zero_grad()"
            )
        if not self._under_way:
            self.traffic.first_sent = time.perf_counter()
        self._under_way.append(self._communicator.all_reduce_async_(bucket.buffer))
        self.traffic.dense_bytes += bucket.nbytes()
        self.traffic.encoded_bytes += bucket.nbytes()
        # A ring all-reduce sends each byte on to the next rank twice, less the part that is its own
        # (Patarasuk & Yuan, JPDC 2009, section 3).
        size = self._communicator.size
        self.traffic.wire_bytes += 2 * (size - 1) * bucket.nbytes() // size
