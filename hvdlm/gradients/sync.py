"""Sums gradients over all ranks while the backward pass is still making them.

The way of a gradient: `backward()` makes it; a hook stores it in its bucket (bucket.py); when all gradients of a bucket
are final, the bucket is submitted to a channel (channel.py), on whose thread or stream its codec (codecs/) reduces it
by operations of the exchange (exchange.py), over the ring (comm/ring.py) or the engine (comm/mpi.py and others). Where
a codec sends segments of a ring all-reduce, the ring calls the codec's encoding for each of them. `wait` returns when
every bucket holds the sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.work import Work
from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError
from hvdlm.gradients.auto.forecast import Cost
from hvdlm.gradients.auto.plan import CodecPlan
from hvdlm.gradients.auto.probe import probe_codec_on_channel
from hvdlm.gradients.auto.tuner import CodecTuner
from hvdlm.gradients.bucket import GradientBucket, bucket_sizes
from hvdlm.gradients.bucket_codecs import BucketCodecs, OwnCodec, common_parameters
from hvdlm.gradients.channel import Channel, open_channels
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.dense import Dense
from hvdlm.gradients.codecs.registry import AUTO, bucket_bytes, candidate_codecs, codec_factory
from hvdlm.gradients.norm import global_norm, global_norm_and_numbers


@dataclass
class Traffic:
    """What one step's gradients cost, on this rank."""

    dense_bytes: int  # that a ring all-reduce of the float32 gradients would send
    wire_bytes: int  # that were sent
    codec_seconds: float  # encoding and decoding
    first_sent: float  # time.perf_counter() when the first message was sent


class GradientSync:
    """Keeps the gradients of a module in buckets and sums them over the ranks of a communicator.

    For each optimizer step:

        sync.zero_grad()
        for each micro-batch: (before the backward pass of the last one: sync.set_last_micro_batch())
            loss.backward()
        sync.wait()

    A rank without data skips the passes; a parameter that gets no gradient counts as zero. Either way every rank sends
    every bucket, in the order of buckets, so that no rank waits for ever.
    """

    def __init__(
        self,
        module: nn.Module,
        communicator: Communicator,
        comm: CommSection,
        compression: CompressionSection,
        own_codec: OwnCodec | None = None,
        algorithm_costs: Sequence[AlgorithmCost] = (),
    ) -> None:
        """Takes over `.grad` of every trainable parameter of `module`. Collective.

        `own_codec`: what it delivers of some of them need not be a gradient, and is no part of `norm` and `scale_`.
        `algorithm_costs`: see `open_channels`.
        """
        parameters = dict(module.named_parameters())
        common = common_parameters(parameters, own_codec)
        self._device = next(p for p in parameters.values() if p.requires_grad).device
        nodes, device = communicator.node_count, self._device.type
        nbytes = bucket_bytes(comm, compression, nodes, device)
        sizes = bucket_sizes(common, nbytes)
        largest = max(sizes)
        self.channels = open_channels(communicator, self._device, comm, compression, largest, algorithm_costs)
        self._communicator = self.channels[0].communicator
        self._comm, self._compression = comm, compression
        self._tuner: CodecTuner | None = None
        plan: CodecPlan | None = None
        if compression.hierarchical and communicator.node_count == 1:
            # Nothing is sent between nodes; a switchable codec delivers residuals that a run on several nodes has saved
            plan = CodecPlan(nbytes, ["none"] * len(sizes))
        elif compression.codec == AUTO:
            candidates = candidate_codecs(comm, compression, nodes, device)
            self._tuner = CodecTuner(self._communicator, self._device, common, nbytes, candidates)
            plan = self._tuner.plan
        self._bucket_codecs = BucketCodecs(parameters, nbytes, compression, plan, own_codec)
        self._bypasses_channels = self._can_bypass_channels()
        self.step = 0  # of the optimizer
        # Whether gradients are reduced only after the backward pass, and only if they are finite on all ranks: the
        # residuals of a step that is then skipped would be wrong.
        self.only_if_finite = False
        self._is_last_micro_batch = False
        self._ready = 0  # buckets 0 .. ready-1 are ready to be reduced
        self._handles: list[Work[Any]] = []  # of the buckets that are being reduced, 0 .. len-1
        self._left_residuals: list[tuple[Tensor, Tensor]] = []  # buffers, and what codecs had left at `narrow_to`
        self._arrival: Work[None] = Work.done(None)  # ends when the last step's sums are there, on a GPU too
        self._index_slots()
        self._hooks = [each.register_post_accumulate_grad_hook(self._on_gradient) for each in self._slots]
        self.traffic = self._measure_traffic()  # of the last step

    @property
    def buckets(self) -> list[GradientBucket]:
        """In the order in which they are reduced."""
        return self._bucket_codecs.buckets

    @property
    def algorithm_costs(self) -> Sequence[AlgorithmCost]:
        """By which the all-reduce of each bucket is chosen."""
        return self.channels[0].exchange.algorithm_costs

    @property
    def codecs(self) -> list[Codec]:
        """The codec of each bucket."""
        return self._bucket_codecs.codecs

    # ---- one step

    def zero_grad(self) -> None:
        """Begins a step: there are no gradients."""
        if self._tuner:
            self._switch_to(self._tuner.plan)
        for bucket in self.buckets:
            bucket.zero_grad()
        for channel in self.channels:
            channel.reset_counters()
        self._is_last_micro_batch = False
        self._ready = 0

    def set_last_micro_batch(self) -> None:
        """From here on a gradient that is made is final, and buckets are reduced when they are ready."""
        self._is_last_micro_batch = True
        if self._tuner:
            self._tuner.backward_started()

    def wait(self) -> None:
        """Returns when this rank's buckets hold the sum over all ranks; NaN if they had to be finite and were not."""
        for bucket in self.buckets[self._ready :]:
            bucket.fill_missing()
        self._advance_ready()
        if self._tuner:
            self._tuner.backward_ended()
        if self.only_if_finite and not self._is_finite_everywhere():
            for bucket in self.buckets:
                bucket.buffer.fill_(math.nan)
            self.traffic = self._measure_traffic()
            return
        self._submit_up_to(len(self.buckets))
        for index, handle in enumerate(self._handles):
            with self._naming_bucket(index):
                handle.wait()
        self._handles.clear()
        self._add_left_residuals_()
        self._arrival.wait()  # of the step before: the host stays at most one step ahead of a GPU
        self._arrival = self._communicator.arrival(self._device)
        self.traffic = self._measure_traffic()
        self.step += 1
        if self._tuner:
            self._tuner.gradients_arrived(self._probe)

    def narrow_to(self, communicator: Communicator) -> None:
        """From the next step on sums gradients over the ranks of `communicator` alone, uncompressed. Collective.

        What codecs have not delivered until then is added to that step's sum. Only between steps, and not with codec
        `auto`.
        """
        self._left_residuals = [
            (bucket.buffer, residual)
            for bucket, codec in zip(self.buckets, self.codecs, strict=True)
            for residual in codec.state().values()
        ]
        dense = self._compression.model_copy(update={"codec": "none", "hierarchical": False})
        largest = max(len(bucket.buffer) for bucket in self.buckets)
        self.channels = open_channels(communicator, self._device, self._comm, dense, largest)
        self._communicator = self.channels[0].communicator
        self._bucket_codecs.make_dense()
        self._bypasses_channels = self._can_bypass_channels()
        self.only_if_finite = False

    def synchronize(self) -> None:
        """Returns when all that was queued on the device has ended, the sums of the last `wait` and `norm` among it.

        On a GPU `wait` returns earlier. Whoever then reads a number that depends on them without this waits for ever
        for a rank that has died; this raises LostRankError after `comm.timeout`. For gradients on a CPU it returns at
        once.
        """
        self._communicator.arrival(self._device).wait()

    def abandon(self) -> None:
        """Ends channels, whose operations have been revoked. Not collective."""
        for channel in self.channels:
            channel.abandon()
        self._handles.clear()

    def release(self) -> None:
        """Lets go of the module. Not collective."""
        for hook in self._hooks:
            hook.remove()

    def close(self) -> None:
        """Closes channels and their groups of ranks, in the order in which all ranks have opened them. Collective."""
        for channel in self.channels:
            channel.close()

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a float32 scalar on their device. Collective."""
        return global_norm(self._sums(), self._communicator)

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """`norm`, and in the same message `numbers`, (k,) float64 on the CPU, of all N ranks: (N, k). Collective."""
        return global_norm_and_numbers(self._sums(), numbers, self._communicator)

    def _sums(self) -> list[Tensor]:
        return [bucket.buffer for bucket in self._bucket_codecs.common_buckets]

    def scale_(self, factor: float | Tensor) -> None:
        """Multiplies all gradients by a number."""
        for bucket in self._bucket_codecs.common_buckets:
            bucket.buffer.mul_(factor)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks: the step, the costs by which an all-reduce is chosen, the plan of `auto`."""
        costs = [dataclasses.astuple(cost) for cost in self.algorithm_costs]
        state = {"step": self.step, "trials": costs, "ranks": self._communicator.size}
        if self._tuner:
            assert self._bucket_codecs.plan is not None
            state["auto"] = self._tuner.state_dict(self._bucket_codecs.plan)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state; on as many ranks with the same all-reduce, since another would round otherwise."""
        self.step = state["step"]
        same_ranks = state["ranks"] == self._communicator.size
        if self._tuner and "auto" in state:
            self._tuner.load_state_dict(state["auto"], same_ranks)
            self._switch_to(self._tuner.plan)
        if same_ranks and state["trials"]:
            for channel in self.channels:
                if channel.exchange.algorithm_costs:
                    channel.exchange.algorithm_costs = [AlgorithmCost(*cost) for cost in state["trials"]]

    def residuals(self) -> list[Tensor]:
        """What this rank's codecs have not delivered, flat."""
        return self._bucket_codecs.flat_states()

    def codec_state(self) -> dict[str, Tensor]:
        """What this rank's codecs keep from step to step, by kind and parameter: views, to be saved or filled."""
        return self._bucket_codecs.state()

    def restore_residuals_(self, factor: float) -> None:
        """Completes restoring a checkpoint, once `codec_state` of all ranks has been filled from it.

        Residuals are multiplied by `factor`. In a hierarchical reduction they are moved to the local leaders.
        Collective.
        """
        self.scale_residuals_(factor)
        hierarchy = self.channels[0].hierarchy
        if hierarchy:
            for flat in self._bucket_codecs.flat_states():
                hierarchy.move_to_leader_(flat)

    def scale_residuals_(self, factor: float) -> None:
        """Multiplies residuals by a number, as gradients are scaled from now on."""
        if factor != 1:
            for flat in [*self._bucket_codecs.flat_states(), *(flat for _, flat in self._left_residuals)]:
                flat.mul_(factor)

    # ---- from a gradient to its bucket, from a bucket to its channel

    def _on_gradient(self, parameter: Tensor) -> None:
        """Hook: autograd has added to the gradient of `parameter`."""
        bucket, slot = self._slots[parameter]
        bucket.store(slot)
        if not self._is_last_micro_batch:
            return
        bucket.pending -= 1
        if not self.only_if_finite:
            self._advance_ready()
            if not (self._tuner and self._tuner.sends_after_backward):
                self._submit_up_to(self._ready)

    def _advance_ready(self) -> None:
        """Advances `_ready` over the leading buckets without pending gradients: all ranks must reduce in one order."""
        while self._ready < len(self.buckets) and self.buckets[self._ready].pending == 0:
            self._ready += 1
            if self._tuner:
                self._tuner.bucket_ready()

    def _submit_up_to(self, stop: int) -> None:
        """Starts to reduce the buckets before `stop` that are not being reduced yet; channels take them in turns."""
        for index in range(len(self._handles), stop):
            bucket = self.buckets[index]
            if not bucket.owns_gradients():
                raise RuntimeError(
                    "a .grad is no longer in its bucket: clear gradients by GradientSync.zero_grad(), not by "
                    "zero_grad() of a module or optimizer"
                )
            channel = self.channels[index % len(self.channels)]
            with self._naming_bucket(index):
                if self._bypasses_channels and not channel.exchange.prefers_ring(bucket.buffer.numel()):
                    handle: Work[Any] = channel.exchange.all_reduce_by_engine_async_(bucket.buffer)
                else:
                    handle = channel.submit(self.codecs[index], bucket.buffer, self.step, f"bucket {index + 1}")
            self._handles.append(handle)

    def _add_left_residuals_(self) -> None:
        """Once after `narrow_to`, in a step that is not skipped."""
        if self._left_residuals and bool(self.norm().isfinite()):
            for buffer, residual in self._left_residuals:
                buffer.add_(self._communicator.all_reduce_(residual))
            self._left_residuals = []

    def _index_slots(self) -> None:
        """Maps each parameter to its bucket and the index of its slot there."""
        self._slots: dict[Tensor, tuple[GradientBucket, int]] = {
            parameter: (bucket, slot) for bucket in self.buckets for slot, parameter in enumerate(bucket.parameters)
        }

    def _can_bypass_channels(self) -> bool:
        """Whether the engine may sum buckets by itself: it has a thread of its own, and takes several at a time."""
        channel = self.channels[0]
        is_dense = all(type(codec) is Dense for codec in self.codecs)
        # otherwise tensors are staged through the host, which the channel's thread does beside the backward pass
        reaches_device = self._device.type == "cpu" or channel.communicator.supports("cuda")
        return is_dense and reaches_device and channel.hierarchy is None

    def _is_finite_everywhere(self) -> bool:
        # Found where the gradients are, and read once: the host waits for a GPU once, not twice
        norms = torch.stack([torch.linalg.vector_norm(bucket.buffer) for bucket in self.buckets])
        overflow = norms.isfinite().all().logical_not().int().reshape(1)
        self._communicator.all_reduce_(overflow, ReduceOp.MAX)
        self._communicator.arrival(self._device).wait()
        return not overflow.any()

    @contextmanager
    def _naming_bucket(self, index: int) -> Iterator[None]:
        """Prefixes errors with the number of the bucket."""
        try:
            yield
        except HvdlmError as error:
            raise type(error)(f"gradient bucket {index + 1} of {len(self.buckets)}: {error}") from error

    def _measure_traffic(self) -> Traffic:
        size = self.channels[0].exchange.size
        dense_bytes = sum(2 * (size - 1) * bucket.nbytes() // size for bucket in self.buckets)
        return traffic_of(self.channels, dense_bytes)

    # ---- codec auto

    def _switch_to(self, plan: CodecPlan) -> None:
        if self._bucket_codecs.switch_to(plan):
            self._index_slots()

    def _probe(self, index: int, name: str) -> Cost:
        """What bucket `index` costs by the codec called `name`, after the codec's warm-up steps."""
        codec = codec_factory(name)(self.buckets[index], self._compression)
        step = max(self.step, 2 * self._compression.warmup_steps)
        buffer = self.buckets[index].buffer
        return probe_codec_on_channel(self.channels[0], codec, buffer, step, f"probe of {name}")


def traffic_of(channels: Sequence[Channel], dense_bytes: int) -> Traffic:
    """What has gone over channels since their counters were reset."""
    first_sent = [each.exchange.first_sent for each in channels if each.exchange.first_sent is not None]
    return Traffic(
        dense_bytes=dense_bytes,
        wire_bytes=sum(channel.exchange.wire_bytes for channel in channels),
        codec_seconds=sum(channel.codec_seconds for channel in channels),
        first_sent=min(first_sent, default=math.nan),
    )
