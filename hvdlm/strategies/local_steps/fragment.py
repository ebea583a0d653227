"""A fragment of the model: what a round averages over the ranks at once.

The way of a difference: after some local step `begin` fills the fragment's buckets with this rank's parameters minus
the outer ones; channels (gradients/channel.py) sum them over all ranks, by codecs that keep residuals, while local
steps go on; `end` lets the outer optimizer step by their average, and merges the outcome into this rank's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.work import Work
from hvdlm.config import CompressionSection, LocalStepsSection
from hvdlm.gradients.bucket import Bucket, group_parameters
from hvdlm.gradients.bucket_codecs import codec_state, flat_states
from hvdlm.gradients.codecs.registry import codec_factory
from hvdlm.strategies.local_steps.groups import Groups
from hvdlm.strategies.local_steps.merge_loops import step_and_merge
from hvdlm.strategies.local_steps.outer_optimizer import OuterOptimizer
from hvdlm.strategies.local_steps.round_progress import RoundProgress
from hvdlm.strategies.strategy import RankState, Report

# Of so many rounds of a fragment one is measured for `drift`
_ROUNDS_TO_MEASURE = 10

# Attributes of a fragment that are equal on all ranks and no tensors
_SAVED = ("rounds", "steps", "began_at", "delivered")


def keeps_sent(settings: LocalStepsSection, is_elastic: bool) -> bool:
    """Whether ranks keep what they have sent, to add the steps that they make meanwhile, or to send it again."""
    overlaps = settings.overlap > 0 or settings.every == "auto"
    return overlaps and (settings.merge == "add" or is_elastic)


def numbers_kept(settings: LocalStepsSection, is_elastic: bool) -> int:
    """Float32 numbers of a `DifferenceBucket` for each parameter."""
    return 2 + keeps_sent(settings, is_elastic) + (settings.momentum > 0)  # outer parameters and differences


class DifferenceBucket(Bucket):
    """Parameters of which this rank's minus the outer ones lie in `buffer`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: LocalStepsSection, is_elastic: bool) -> None:
        super().__init__(parameters)
        self.outer = torch.zeros_like(self.buffer)
        self.velocity = torch.zeros_like(self.buffer) if settings.momentum else None
        # This rank's parameters as they were when their round began
        self.sent = torch.zeros_like(self.buffer) if keeps_sent(settings, is_elastic) else None
        self._outer = self.split(self.outer)
        self._sent = None if self.sent is None else self.split(self.sent)
        self._differences = self.split(self.buffer)
        self._alpha = settings.alpha if settings.merge == "mix" else 0.0

    def local(self) -> list[Tensor]:
        """This rank's parameters."""
        return [parameter.detach() for parameter in self.parameters]

    def set_outer_(self) -> None:
        """Sets the outer parameters to this rank's."""
        torch._foreach_copy_(self._outer, self.local())

    def set_local_(self) -> None:
        """Sets this rank's parameters to the outer ones."""
        torch._foreach_copy_(self.local(), self._outer)

    def take_differences_(self) -> None:
        """Fills `buffer` with this rank's differences."""
        if self._sent is None or self.sent is None:
            torch._foreach_copy_(self._differences, self.local())
            self.buffer.sub_(self.outer)
        else:
            torch._foreach_copy_(self._sent, self.local())
            torch.sub(self.sent, self.outer, out=self.buffer)

    def take_differences_again_(self) -> None:
        """Fills `buffer` with what `take_differences_` has filled it with, while that round is under way."""
        if self.sent is None:
            self.take_differences_()
        else:
            torch.sub(self.sent, self.outer, out=self.buffer)

    def end_round_(self, optimizer: OuterOptimizer, factor: float, has_overlapped: bool) -> None:
        """Lets the outer parameters step by `factor` times what `buffer` holds, and merges them into this rank's.

        `has_overlapped`: whether this rank has made steps since `take_differences_`.
        """
        sent = self.sent if has_overlapped and not self._alpha else None
        (self._end_by_loops_ if self.buffer.is_cpu else self._end_with_torch_)(optimizer, factor, sent)

    def _end_with_torch_(self, optimizer: OuterOptimizer, factor: float, sent: Tensor | None) -> None:
        if factor != 1:
            self.buffer.mul_(factor)
        optimizer.step_(self.outer, self.velocity, self.buffer)
        if self._alpha:
            torch._foreach_lerp_(self.local(), self._outer, 1 - self._alpha)
        elif sent is not None:
            change = torch.sub(self.outer, sent, out=self.buffer)
            torch._foreach_add_(self.local(), self.split(change))
        else:
            self.set_local_()

    def _end_by_loops_(self, optimizer: OuterOptimizer, factor: float, sent: Tensor | None) -> None:
        def arrays(flat: Tensor | None) -> list[np.ndarray]:
            views = [self.buffer.new_empty(0)] * len(self.names) if flat is None else self.split(flat)
            return [view.view(-1).numpy() for view in views]

        numbers = [np.float32(each) for each in (factor, optimizer.lr, optimizer.momentum, self._alpha)]
        local = [each.view(-1).numpy() for each in self.local()]
        for differences, *others in zip(
            *map(arrays, (self.buffer, self.velocity, sent, self.outer)), local, strict=True
        ):
            step_and_merge(differences, *numbers, *others)


class Fragment:
    """Consecutive parameters whose differences are averaged together. For every rank: all begin and end it alike."""

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        groups: Groups,
        bucket_bytes: int,
        settings: LocalStepsSection,
        compression: CompressionSection,
        is_elastic: bool,
    ) -> None:
        """`name`: in what is said of it. `groups`: those that average it. `is_elastic`: ranks may die."""
        self.name, self.groups, self._is_elastic = name, groups, is_elastic
        flat = group_parameters(parameters, bucket_bytes)
        self.buckets = [DifferenceBucket(each, settings, is_elastic) for each in flat]
        self.codecs = [codec_factory(compression.codec)(bucket, compression) for bucket in self.buckets]
        self.outer_optimizer = OuterOptimizer(settings.lr, settings.momentum)
        self.tokens = torch.zeros((), dtype=torch.int64)  # that this rank has trained on since its last round began
        self.steps = 0  # since its last round began, the same on all ranks
        self.rounds = 0  # begun
        self.is_under_way = False
        # The step after which the last round began, and the last one that has ended: so far ranks know of each other
        self.began_at = self.delivered = 0
        # Squared lengths of the differences of a round: this rank's, and their average
        self.own_square = self.average_square = 0.0
        self._handles: list[Work[None]] = []
        self._barriers: list[Work[None]] = []  # where ranks may die: whether all have the sums
        self._totals: Work[Tensor] = Work.done(Report().message())
        self._ended_totals: Tensor | None = None  # of the last round that has ended
        self._nominal_tokens = 1.0
        self._factor: float | None = None  # from what the buckets hold to the average; None: it may be arriving
        # Of the last round, to send it again: what this rank told, of how many tokens, and what codecs had kept before
        self._message, self._global_tokens = Report().message(), 0
        self._has_sent = False  # whether its buckets were sent, so that they hold an average when it ends
        self._kept: list[Tensor] = []

    @property
    def is_own_average(self) -> bool:
        """Whether there is one group, whose parameters become the outer ones, bit for bit."""
        return self.groups.count == 1 and self.outer_optimizer.sets_average

    # ---- a round

    def begin_local_steps(self, step: int) -> None:
        """After `step` steps of all ranks together, which then hold the same parameters."""
        self.began_at = self.delivered = step
        for bucket in self.buckets:
            bucket.set_outer_()

    def count(self, tokens: int) -> None:
        """Counts a local step on `tokens` targets."""
        self.tokens += tokens
        self.steps += 1

    def begin(self, step: int, tokens_before: Callable[[int], int], own: Report, told: Tensor | None = None) -> None:
        """Begins a round after `step` steps: the leader of each group submits its differences, weighted by the tokens
        of its group.

        `tokens_before`: of how many tokens the global batches before one are. Weights are over a group's part of those
        since the fragment's last round began, so that they are about 1: what a codec has not delivered counts as much
        in a shorter round. `own` but for its tokens, and `told`, (n,) int64: what this rank tells the others.
        """
        message = own._replace(tokens=int(self.tokens)).message()
        self._message = message if told is None else torch.cat([message, told])
        self._global_tokens = tokens_before(step) - tokens_before(self.began_at)
        self.began_at = step
        self.tokens.zero_()
        self.steps = 0
        self.rounds += 1
        self.is_under_way = True
        if self._is_elastic:
            self._kept = [tensor.clone() for tensor in self._codec_state().values()]
        self._send(DifferenceBucket.take_differences_)

    def begin_again(self) -> None:
        """Begins the round that is under way once more, among the ranks that are left."""
        for tensor, before in zip(self._codec_state().values(), self._kept, strict=True):
            tensor.copy_(before)
        self._send(DifferenceBucket.take_differences_again_)

    def _send(self, take: Callable[[DifferenceBucket], None]) -> None:
        is_leader, channels = self.groups.is_leader, self.groups.channels
        message = self._message.clone()
        tokens = int(message[0])
        message[0] *= is_leader
        self._totals = self.groups.everyone.all_reduce_async_(message)
        self._factor, self._nominal_tokens = None, self._global_tokens / self.groups.count
        weight = tokens / self._nominal_tokens
        if measures := self._measures_drift():
            self.own_square = 0.0
        self._handles, self._barriers = [], []
        self._has_sent = not self.is_own_average
        pairs = zip(self.buckets, self.codecs, strict=True) if self._has_sent else []
        for index, (bucket, codec) in enumerate(pairs):
            take(bucket)
            if measures:
                self.own_square += _square(bucket.buffer) * is_leader
            if weight != 1:
                bucket.buffer.mul_(weight)
            if is_leader:
                name = f"{self.name}, bucket {index + 1}"
                channel = channels[index % len(channels)]
                self._handles.append(channel.submit(codec, bucket.buffer, self.rounds - 1, name))
        if self._is_elastic:
            self._barriers = [channel.submit_barrier() for channel in channels]

    def _measures_drift(self) -> bool:
        """Whether the differences of the round under way are measured: that takes two passes over them."""
        return (self.rounds - 1) % _ROUNDS_TO_MEASURE == 0

    def arrive(self) -> Tensor:
        """Waits until the buckets hold the sum over all ranks, and returns what these have told: the sum of their
        reports' messages and of what `begin` was given beside, (5 + n,) int64."""
        totals = self._totals.wait()
        if self._factor is None:
            for handle in self._handles:
                handle.wait()
            self._handles.clear()
            self._factor = self._nominal_tokens / max(1, int(totals[0]))
            for bucket in self.buckets:
                self.groups.share_(bucket.buffer)
            if self._measures_drift():
                self.average_square = self._factor**2 * sum(_square(bucket.buffer) for bucket in self.buckets)
        return totals

    def _average_(self) -> None:
        """Makes the sum that has arrived the average."""
        if self._factor not in (None, 1):
            for bucket in self.buckets:
                bucket.buffer.mul_(self._factor)
            self._factor = 1.0

    def end(self, has_overlapped: bool) -> Tensor:
        """Ends the round: the outer optimizer steps, and its outcome is merged; returns what `arrive` does.

        `has_overlapped`: whether steps were made since it began.
        """
        totals = self.arrive()
        for barrier in self._barriers:
            barrier.wait()
        assert self._factor is not None
        with torch.no_grad():
            for bucket in self.buckets:
                if self._has_sent:
                    bucket.end_round_(self.outer_optimizer, self._factor, has_overlapped)
                else:
                    bucket.set_outer_()
        self.is_under_way, self.delivered, self._ended_totals = False, self.began_at, totals
        return totals

    # ---- after a rank has died

    def progress(self) -> RoundProgress:
        """How far this rank has come. After its channels have been abandoned."""
        has_sums = self._factor is not None or all(_has_ended(each) for each in self._handles)
        totals = self._totals.wait() if self.is_under_way and _has_ended(self._totals) else None
        rounds = self.rounds, self.is_under_way, has_sums, totals, self._ended_totals
        return RoundProgress(*rounds, self.began_at, self.delivered)

    def have_arrived(self, totals: Tensor) -> None:
        """All ranks that are left have the sums of the round under way, and these totals: it can end."""
        self._totals, self._barriers = Work.done(totals), []

    def resume(self) -> None:
        """Goes on with a round that was saved under way: its buckets are to be filled with the average."""
        self._totals = Work.done(Report().message())
        self.is_under_way, self._has_sent, self._factor = True, True, 1.0

    def restart(self, arrived: Container[str]) -> None:
        """Makes the outer parameters this rank's, after a step by the average differences that have `arrived`.

        Those stand in the buckets, for the parameters of these names.
        """
        with torch.no_grad():
            for bucket in self.buckets:
                velocities = [None] * len(bucket.names) if bucket.velocity is None else bucket.split(bucket.velocity)
                pieces = zip(
                    bucket.names, bucket.split(bucket.outer), velocities, bucket.split(bucket.buffer), strict=True
                )
                for name, outer, velocity, difference in pieces:
                    if name in arrived:
                        self.outer_optimizer.step_(outer, velocity, difference)
                bucket.set_local_()
        self.tokens.zero_()
        self.steps, self.is_under_way = 0, False

    # ---- state

    def state_dict(self) -> dict[str, int]:
        """What is equal on all ranks and no tensor."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores it."""
        for name in _SAVED:
            setattr(self, name, state[name])

    def outer_parameters(self) -> dict[str, Tensor]:
        """By name: views."""
        return self._by_name(lambda bucket: bucket.outer)

    def average_state(self) -> dict[str, Tensor]:
        """What is equal on all ranks beside the outer parameters. Waits for a round that is under way."""
        state = self._named("outer_momentum", lambda bucket: bucket.velocity)
        if self.is_under_way:
            self.arrive()
            self._average_()
            state.update(self.differences())
        return state

    def differences(self) -> dict[str, Tensor]:
        """The buckets, as they are saved."""
        return self._named("average_difference", lambda bucket: bucket.buffer)

    def residuals(self) -> list[Tensor]:
        """What this rank's codecs have not delivered, flat."""
        return flat_states(self.codecs)

    def rank_state(self) -> RankState:
        """What this rank has of its own."""
        codecs = {f"difference_{name}": tensor for name, tensor in self._codec_state().items()}
        own = {
            f"local.{name}": tensor
            for bucket in self.buckets
            for name, tensor in zip(bucket.names, bucket.local(), strict=True)
        }
        if self.is_under_way:
            own.update(self._named("sent", lambda bucket: bucket.sent))
        own[f"tokens.{self.name}"] = self.tokens
        return RankState(summed=codecs, dropped=own)

    def _codec_state(self) -> dict[str, Tensor]:
        return codec_state(self.buckets, self.codecs)

    def _named(self, kind: str, flat: Callable[[DifferenceBucket], Tensor | None]) -> dict[str, Tensor]:
        return {f"{kind}.{name}": view for name, view in self._by_name(flat).items()}

    def _by_name(self, flat: Callable[[DifferenceBucket], Tensor | None]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for bucket in self.buckets:
            tensor = flat(bucket)
            if tensor is not None:
                found.update(bucket.by_name(tensor))
        return found


def _has_ended(work: Work[Any]) -> bool:
    """Whether it has come to its result, and not to an error."""
    try:
        work.wait()
    except (DeadRankError, CancelledError):
        return False
    return True


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
