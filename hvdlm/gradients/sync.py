"""Sums gradients over all ranks while the backward pass is still making them.

A gradient's way: `backward()` makes it -> a hook takes it into its bucket (bucket.py) and counts it -> the bucket is
full -> a codec (codecs/) sends it on a lane's communication thread or stream (lane.py, exchange.py), or the engine sums
it as it is -> `wait` returns when every bucket holds the sum.
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

from hvdlm.comm.communicator import Communicator, Work
from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError
from hvdlm.gradients.bucket import divide, make_buckets
from hvdlm.gradients.chooser import Chooser, Plan
from hvdlm.gradients.codec_trial import try_codec
from hvdlm.gradients.codecs.choice import AUTO, bucket_bytes, codec_maker
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.dense import Dense
from hvdlm.gradients.codecs.switching import Switching
from hvdlm.gradients.forecast import Cost
from hvdlm.gradients.lane import Lane, lane_count
from hvdlm.gradients.moment import Moment
from hvdlm.gradients.trial import Trial


@dataclass
class Traffic:
    """What one step's gradients cost, on this rank."""

    dense_bytes: int  # that a ring all-reduce of the gradients as they are would send
    wire_bytes: int  # that was sent
    codec_seconds: float  # making and reading messages
    first_sent: float  # time.perf_counter() when the first message left


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

    def __init__(
        self, module: nn.Module, communicator: Communicator, comm: CommSection, compression: CompressionSection
    ) -> None:
        """Takes over `.grad` of every trainable parameter of `module`. Collective."""
        self._parameters = dict(module.named_parameters())
        nbytes = bucket_bytes(comm, compression, communicator.node_count)
        self.buckets = make_buckets(self._parameters, nbytes)
        self._device = device = self.buckets[0].buffer.device
        # Gradients have a communicator of their own where the engine can split one: what the trainer says meanwhile
        # is then no message among them.
        can_split = communicator.supports("split")
        owns = [communicator.split(0, communicator.rank) for _ in range(lane_count(communicator, device) * can_split)]
        self._communicator = own = owns[0] if owns else communicator
        first = Lane(own, device, comm, compression, self.buckets)
        # Buckets take turns on them
        self.lanes = [first]
        self.lanes += [Lane(each, device, comm, compression, self.buckets, first.exchange.trials) for each in owns[1:]]
        self._compression = compression
        self._plan = Plan(nbytes, [])  # that codec auto follows
        self._chooser: Chooser | None = None
        if compression.by_node and own.node_count == 1:
            # Nothing goes between nodes; what was owed when there were several goes with the next gradients
            self.codecs = self._switching(["none"] * len(self.buckets))
        elif compression.codec == AUTO:
            sizes = {}
            for name in (each.strip() for each in compression.candidates.split(",")):
                codec_maker(name)  # an unknown one is an error now, not when it is tried
                alone = compression.model_copy(update={"codec": name})
                sizes[name] = bucket_bytes(comm, alone, communicator.node_count)
            self._chooser = Chooser(own, device, nbytes, sizes, self._cut)
            self._plan = self._chooser.plan
            self.codecs = self._switching(self._plan.names)
        else:
            self.codecs = [codec_maker(compression.codec)(bucket, compression) for bucket in self.buckets]
        # What an engine sums needs no thread of ours: it goes on by itself, and with several buckets at a time
        is_dense = all(type(codec) is Dense for codec in self.codecs)
        is_reached = device.type == "cpu" or first.supports_cuda  # else a thread copies to the host and back
        self._can_leave_to_engine = is_dense and is_reached and first.nodes is None
        self.step = 0  # of the optimizer: the number of the gradients that are being made
        # Gradients wait for the end of the backward pass, and are sent only if they are finite on all ranks: what a
        # codec owes after a step that is then skipped would be wrong.
        self.only_if_finite = False
        self._missing: list[int] = []  # gradients not made yet, by bucket
        self._full = 0  # buckets 0 .. full-1 are
        self._under_way: list[Work[None]] = []  # of buckets 0 .. len-1, in their order
        self._is_last_micro_batch = False
        self._backward_ended = self._arrived = Moment(device)
        self.traffic = self._traffic()  # of the last step
        self._seats = self._find_seats()
        for parameter in self._seats:
            parameter.register_post_accumulate_grad_hook(self._count)

    def begin(self) -> None:
        """Clears all gradients and starts counting anew."""
        if self._chooser:
            self._follow(self._chooser.plan)
        for bucket in self.buckets:
            bucket.clear()
        self._missing = [len(bucket.parameters) for bucket in self.buckets]
        self._is_last_micro_batch = False
        self._full = 0
        for lane in self.lanes:
            lane.clear()

    def last_micro_batch(self) -> None:
        """From here on a gradient that is made is complete, and full buckets are sent."""
        self._is_last_micro_batch = True
        if self._chooser:
            self._chooser.begin()

    def wait(self) -> None:
        """Returns when every bucket, on every rank, holds the sum over all ranks; NaN if those were not to be sent."""
        for bucket in self.buckets[self._full :]:
            bucket.complete()
            self._count_full()
        if self._chooser:
            self._chooser.backward_ended()
        if self.only_if_finite and not self._is_finite_everywhere():
            for bucket in self.buckets:
                bucket.buffer.fill_(math.nan)
            self._backward_ended = self._arrived = Moment(self._device)
            self.traffic = self._traffic()
            return
        self._backward_ended = Moment(self._device)
        for index in range(len(self._under_way), len(self.buckets)):
            self._send(index)
        for index, work in enumerate(self._under_way):
            with self._named(index):
                work.wait()
        self._arrived = Moment(self._device)
        self._under_way.clear()
        self.traffic = self._traffic()
        self.step += 1
        if self._chooser:
            self._chooser.arrived(self._try)

    @property
    def exposed_seconds(self) -> float:
        """How long the last `wait` has waited: communication that no computation hid."""
        return self._arrived - self._backward_ended

    def _traffic(self) -> Traffic:
        size = self.lanes[0].exchange.size
        first_sent = [lane.exchange.first_sent for lane in self.lanes if lane.exchange.first_sent is not None]
        return Traffic(
            dense_bytes=sum(2 * (size - 1) * bucket.nbytes() // size for bucket in self.buckets),
            wire_bytes=sum(lane.exchange.wire_bytes for lane in self.lanes),
            codec_seconds=sum(lane.codec_seconds for lane in self.lanes),
            first_sent=min(first_sent, default=math.nan),
        )

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks: the step, the trials by which an all-reduce is chosen, the choice of `auto`."""
        trials = [dataclasses.astuple(trial) for trial in self.lanes[0].exchange.trials]
        state = {"step": self.step, "trials": trials, "ranks": self._communicator.size}
        return {**state, "auto": self._chooser.state_dict(self._plan)} if self._chooser else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved one, on as many ranks with the same all-reduce: another would round otherwise."""
        self.step = state["step"]
        if self._chooser and "auto" in state:
            self._chooser.load_state_dict(state["auto"], state["ranks"] == self._communicator.size)
            self._follow(self._chooser.plan)
        if state["ranks"] == self._communicator.size and state["trials"]:
            for lane in self.lanes:
                if lane.exchange.trials:
                    lane.exchange.trials = [Trial(*each) for each in state["trials"]]

    def codec_state(self) -> dict[str, Tensor]:
        """What this rank's codecs keep from step to step, by kind and parameter: views, to be saved or filled."""
        by_parameter = {
            f"{kind}.{name}": piece
            for bucket, codec in zip(self.buckets, self.codecs, strict=True)
            for kind, flat in codec.state().items()
            for name, piece in zip(bucket.names, bucket.cut(flat), strict=True)
        }
        further = {name: tensor for codec in self.codecs for name, tensor in codec.further_state().items()}
        return {**by_parameter, **further}

    def adopt_owed_(self, factor: float) -> None:
        """Lets ranks that speak for their nodes owe what `codec_state` of all was filled with, times a number."""
        self.scale_owed_(factor)
        nodes = self.lanes[0].nodes
        if nodes:
            for codec in self.codecs:
                for flat in codec.state().values():
                    nodes.hand_to_speaker_(flat)

    def scale_owed_(self, factor: float) -> None:
        """Multiplies what codecs keep by a number, as gradients are from now on."""
        for codec in self.codecs if factor != 1 else []:
            for flat in codec.state().values():
                flat.mul_(factor)

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a float32 scalar on their device."""
        norms = torch.stack([torch.linalg.vector_norm(bucket.buffer) for bucket in self.buckets])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def scale_(self, factor: float | Tensor) -> None:
        """Multiplies all gradients by a number."""
        for bucket in self.buckets:
            bucket.buffer.mul_(factor)

    def _count(self, parameter: Tensor) -> None:
        """Autograd has made a gradient."""
        index, place = self._seats[parameter]
        self.buckets[index].take(place)
        if self._is_last_micro_batch:
            self._missing[index] -= 1
            self._send_what_is_full()

    def _find_seats(self) -> dict[Tensor, tuple[int, int]]:
        """The bucket of each parameter, and its place there."""
        return {
            parameter: (index, place)
            for index, bucket in enumerate(self.buckets)
            for place, parameter in enumerate(bucket.parameters)
        }

    def _send_what_is_full(self) -> None:
        """Sends full buckets, but none before its predecessors: all ranks must send in one order."""
        if self.only_if_finite:
            return
        while self._full < len(self.buckets) and self._missing[self._full] == 0:
            self._count_full()
        if self._chooser and self._chooser.holds_back:
            return
        while len(self._under_way) < self._full:
            self._send(len(self._under_way))

    def _count_full(self) -> None:
        self._full += 1
        if self._chooser:
            self._chooser.full()

    def _is_finite_everywhere(self) -> bool:
        bad = torch.tensor([float(not math.isfinite(float(self.norm())))])
        self._communicator.all_reduce_(bad)
        return not bad.any()

    def _send(self, index: int) -> None:
        bucket = self.buckets[index]
        if not bucket.holds_its_gradients():
            raise RuntimeError(
                "a .grad no longer lies in its bucket: clear gradients with GradientSync.begin(), not with zero_grad()"
            )
        lane = self.lanes[index % len(self.lanes)]
        with self._named(index):
            if self._can_leave_to_engine and not lane.exchange.prefers_ring(bucket.buffer.numel()):
                self._under_way.append(lane.exchange.all_reduce_by_engine_async_(bucket.buffer))
            else:
                name = f"bucket {index + 1}"
                self._under_way.append(lane.submit(self.codecs[index], bucket.buffer, self.step, name))

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """Says of an error which bucket it befell."""
        try:
            yield
        except HvdlmError as error:
            raise type(error)(f"gradient bucket {index + 1} of {len(self.buckets)}: {error}") from error

    def _cut(self, nbytes: int) -> list[int]:
        """Elements of each bucket of about so many bytes."""
        groups = divide(self._parameters, nbytes)
        return [sum(parameter.numel() for parameter in group.values()) for group in groups]

    def _switching(self, names: Sequence[str]) -> list[Codec]:
        return [Switching(name, bucket, self._compression) for name, bucket in zip(names, self.buckets, strict=True)]

    def _follow(self, plan: Plan) -> None:
        """Between steps: codecs change, and if need be buckets; what is owed stays with its parameter."""
        old, self._plan = self._plan, plan
        if plan.bucket_bytes == old.bucket_bytes:
            for codec, name in zip(self.codecs, plan.names, strict=True):
                assert isinstance(codec, Switching)
                codec.become(name)
            return
        kept = {name: tensor.clone() for name, tensor in self.codec_state().items()}
        self.buckets = make_buckets(self._parameters, plan.bucket_bytes)
        self.codecs = self._switching(plan.names)
        self._seats = self._find_seats()
        for name, tensor in self.codec_state().items():
            if name in kept:
                tensor.copy_(kept[name])

    def _try(self, index: int, name: str) -> Cost:
        """What the bucket would cost by the codec called `name`, once it is warm."""
        codec = codec_maker(name)(self.buckets[index], self._compression)
        step = max(self.step, 2 * self._compression.warmup_steps)

        def reduce(gradients: Tensor) -> float:
            lane = self.lanes[0]
            before = lane.codec_seconds
            lane.reduce_(codec, gradients, step, f"trial of {name}")
            return lane.codec_seconds - before

        return try_codec(self._communicator, self.buckets[index].buffer, reduce)
