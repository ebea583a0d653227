"""Ranks train on their own for some steps; then what they have learned is averaged: local SGD, DiLoCo.

Rounds (rounds.py) of fragments of the model (fragment.py) are averaged over groups of ranks (groups.py), one or a node
each, and an outer optimizer (outer_optimizer.py) steps by the average. Between rounds each group steps on its own, as
every_step.py does. Before the first local step all ranks may step together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.gradients.channel import Channel, open_channels
from hvdlm.gradients.codecs.registry import bucket_bytes
from hvdlm.gradients.sync import Traffic, traffic_of
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.local_steps.fragment import Fragment
from hvdlm.strategies.local_steps.groups import each_alone, make_groups
from hvdlm.strategies.local_steps.interval import TIMED_STEPS, ComputeTimer, choose, round_seconds, rounds_of
from hvdlm.strategies.local_steps.pace import Pace
from hvdlm.strategies.local_steps.round_progress import RoundProgress, rounds_ended
from hvdlm.strategies.local_steps.rounds import split_into_fragments
from hvdlm.strategies.local_steps.warmup import with_warmup_codec
from hvdlm.strategies.optimizer import deal_out_among, optimizer_tensors
from hvdlm.strategies.replaced_parameters import parameters_replaced
from hvdlm.strategies.strategy import Group, RankState, Report, StepEnd, Strategy, raise_if_unreadable


class LocalSteps(Strategy):
    """`local_steps.warmup_steps` steps of all ranks together, then local steps and rounds."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        config: Config,
        algorithm_costs: Sequence[AlgorithmCost] = (),
    ) -> None:
        """Takes over `.grad` of all trainable parameters. Collective. `algorithm_costs`: see `open_channels`."""
        self._model, self._optimizer, self.communicator = model, optimizer, communicator
        settings = config.local_steps
        self._rounds = rounds_of(settings)
        self._compression = config.compression
        # Of all ranks before the first local step, then of a group
        self._every_step = EveryStep(
            model, optimizer, communicator, with_warmup_codec(config), algorithm_costs=algorithm_costs
        )
        self.sync = self._every_step.sync
        self._first_channels = self.sync.channels
        device = model.output_weight.device
        nbytes = bucket_bytes(config.comm, config.compression, communicator.node_count, device.type)
        largest = max(len(bucket.buffer) for bucket in self.sync.buckets)
        self._groups = make_groups(communicator, self.sync.channels, device, config, largest)
        self._reopen = partial(open_channels, communicator, device, config.comm, config.compression, largest)
        named = dict(model.named_parameters())
        self.fragments = [
            Fragment(
                f"fragment {index + 1}", group, self._groups, nbytes, settings, config.compression, config.comm.elastic
            )
            for index, group in enumerate(split_into_fragments(named, settings.fragments))
        ]
        self._tokens_before = config.tokens_before
        self._step = 0  # steps done
        self._has_begun = False  # local steps have, on this rank
        self._is_ending = False  # a step is; of it, what still has to end and to begin, and totals of what has ended
        self._to_end, self._to_begin, self._totals = list[Fragment](), list[Fragment](), list[Tensor]()
        self._to_send_again = list[Fragment]()  # after a rank has died
        self._own = Report()  # what this rank has not told the others yet
        self._traffic = self.sync.traffic
        self._chooses_interval = settings.every == "auto"  # when the first local step begins
        self._pace = Pace(self._groups.index, self._groups.count) if settings.by == "seconds" else None
        self._timer = ComputeTimer(device) if self._chooses_interval or self._pace else None
        self._takes_part = True  # in the step under way
        self._event: str | None = None  # what is to be said of the next step
        # While a checkpoint is restored: do local steps go on as they were, and whose average differences had arrived
        self._goes_on = False
        self._arrived: list[str] = []

    @property
    def is_local(self) -> bool:
        """Whether the next step is a local one."""
        return self._step >= self._rounds.warmup_steps

    @property
    def group(self) -> Group:
        return Group(self._groups.own, self._groups.index) if self.is_local else super().group

    # ---- one step

    def takes_part(self) -> bool:
        self._takes_part = self._pace is None or not self.is_local or self._pace.takes_part()
        return self._takes_part

    def begin_step(self, own: Report) -> Work[int]:
        if self._timer:
            self._timer.begin_step()
        if not self.is_local:
            return self._every_step.begin_step(own)
        if not self._has_begun:
            self._begin_local_steps()
        # What ranks tell of errors and ask for, they tell in a round
        self._own = self._own.joined_with(own)
        self._measure_traffic()
        return self._every_step.begin_step(Report(own.tokens)).then(self._count)

    def _count(self, tokens: int) -> int:
        """Counts the tokens of this group's step."""
        for fragment in self.fragments:
            fragment.count(tokens)
        return tokens

    def set_last_micro_batch(self) -> None:
        self._every_step.set_last_micro_batch()

    def wait(self) -> None:
        with self._timer.waiting() if self._timer else nullcontext():
            self._every_step.wait()

    @property
    def traffic(self) -> Traffic:
        return self._traffic if self.is_local else self._every_step.traffic

    def _measure_traffic(self) -> None:
        """Counts what was sent since the step before began: rounds go on between steps."""
        within = self._every_step.traffic
        between = traffic_of(self._groups.channels, within.dense_bytes)
        nbytes, seconds = between.wire_bytes + within.wire_bytes, between.codec_seconds + within.codec_seconds
        self._traffic = replace(between, wire_bytes=nbytes, codec_seconds=seconds)
        for channel in self._groups.channels:
            channel.reset_counters()

    @property
    def channels(self) -> list[Channel]:
        return self._groups.channels if self.is_local else self.sync.channels

    def norm(self) -> Tensor:
        return self._every_step.norm()

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self._every_step.norm_and_numbers(numbers)

    def scale_residuals_(self, factor: float) -> None:
        self._every_step.scale_residuals_(factor)

    def leave_out_if(self, found: Tensor) -> bool:
        return self._every_step.leave_out_if(found)

    def apply(self, rate: float) -> None:
        self._every_step.apply(rate)

    def end_step(self) -> StepEnd:
        if not self._is_ending:
            was_local = self.is_local
            self._step += 1
            seconds = self._timer.end_step() if self._timer else 0.0
            if self._pace and was_local and self._takes_part:
                self._pace.add(seconds)
            if not was_local:
                return self._every_step.end_step()
            # All that end are under way, but where a resumed run has begun its rounds anew
            ending = (self.fragments[index] for index in self._rounds.ending(self._step))
            self._to_end = [fragment for fragment in ending if fragment.is_under_way]
            self._to_begin = [self.fragments[index] for index in self._rounds.beginning(self._step)]
            self._is_ending = True
        self._have_rounds()
        end = self._meet(self._totals)
        self._is_ending, self._totals = False, []
        return end

    def _have_rounds(self) -> None:
        """Those that follow the last local step; the rest of them after a rank has died."""
        while self._to_end:
            self._totals.append(self._to_end[0].end(has_overlapped=True))
            self._to_end.pop(0)
        while self._to_begin:
            fragment = self._to_begin[0]
            if not fragment.is_under_way:
                told = self._pace.tell(self._groups.is_leader) if self._pace else None
                fragment.begin(self._step, self._tokens_before, self._own, told)
                self._own = self._own._replace(save=False, unread=0)  # told once
            if not self._rounds.overlap or fragment.is_own_average:
                self._totals.append(fragment.end(has_overlapped=False))
            self._to_begin.pop(0)

    def arrive(self) -> None:
        for fragment in self.fragments:
            if fragment.is_under_way:
                fragment.arrive()

    def finish(self) -> int:
        """Ends the rounds under way, and then has one of every fragment that has been trained since its last."""
        if self.ranks_are_equal:
            return 0
        totals = [each.end(has_overlapped=True) for each in self.fragments if each.is_under_way]
        trained = [fragment for fragment in self.fragments if fragment.steps]
        for fragment in trained:
            fragment.begin(self._step, self._tokens_before, self._own)
            self._own = self._own._replace(unread=0)
        totals += [fragment.end(has_overlapped=False) for fragment in trained]
        self._model.update_low_precision_weights()
        return sum(Report.unread_of(each) for each in totals)

    def close(self) -> None:
        for channel in self._first_channels:
            channel.close()
        self._every_step.close()
        self._groups.close()

    def _begin_local_steps(self) -> None:
        """All ranks hold the same model: it is the first average."""
        self.communicator.activity.begin_wait("the other ranks, to begin local steps")
        if self._timer and self._chooses_interval:
            round_ = round_seconds(self._groups, self.fragments, self._compression)
            self._rounds, self._event = choose(self._rounds, self._groups, self._timer.seconds(), round_)
        self.communicator.barrier()  # where one rank has begun, every other has all that it needs to do so
        self._leave_warm_up()

    def _leave_warm_up(self) -> None:
        for fragment in self.fragments:
            fragment.begin_local_steps(self._step)
        self._interval_is_known()
        self._every_step.narrow_to(self._groups.own)
        self._has_begun = True

    def _interval_is_known(self) -> None:
        self._chooses_interval = False
        if self._pace is None:
            self._timer = None

    def _meet(self, totals: list[Tensor]) -> StepEnd:
        """What is known after the rounds that have ended in this step."""
        event, self._event = self._event, None
        self._model.update_low_precision_weights()
        if not totals:
            return StepEnd(stop=False, save=False, unread=0, ranks_have_met=False, event=event)
        told = len(Report().message())
        _, stops, saves, unread, errors, ends = torch.stack([each[:told] for each in totals]).sum(0).tolist()
        if errors:
            raise_if_unreadable(self.communicator, self._own.error)
        if self._pace:
            self._pace.hear(totals[-1][told:])
        return StepEnd(stops > 0, saves > 0, unread, ranks_have_met=True, event=event, end=ends > 0)

    # ---- after a rank has died

    def abandon(self) -> None:
        for channel in [*self._first_channels, *self._groups.channels]:
            channel.abandon()
        deal_out_among(self._optimizer, None)

    def release(self) -> None:
        self._every_step.release()

    def step_state(self) -> dict[str, Tensor]:
        return self._every_step.step_state()

    def residuals(self) -> list[Tensor]:
        if not self._has_begun:
            return self._every_step.residuals()
        return [residual for fragment in self.fragments for residual in fragment.residuals()]

    def progress(self) -> list[RoundProgress] | None:
        return [fragment.progress() for fragment in self.fragments] if self._has_begun else None

    def go_on(self, progress: Sequence[list[RoundProgress] | None]) -> int:
        """A round that some rank has ended, of which then all have the sums, ends everywhere. So does one of which all
        that are left have the sums. Any other is sent again: the differences stand in `sent`, or have not changed.
        """
        if not self._has_begun:  # some rank has
            self._leave_warm_up()
        costs = self._first_channels[0].exchange.algorithm_costs
        self._first_channels = self._reopen(costs)
        self._groups = each_alone(self.communicator, self._first_channels)
        delivered, self._to_send_again = 0, []
        for index, fragment in enumerate(self.fragments):
            fragment.groups = self._groups
            ended = rounds_ended([None if told is None else told[index] for told in progress])
            delivered = max(delivered, ended.delivered)
            if fragment.is_under_way and fragment.rounds == ended.rounds:
                assert ended.totals is not None
                fragment.have_arrived(ended.totals)
            elif fragment.is_under_way:
                self._to_send_again.append(fragment)
        return delivered

    def send_again(self) -> None:
        for fragment in sorted(self._to_send_again, key=lambda each: each.began_at):  # as where some begin only now
            fragment.begin_again()

    # ---- the parameters to keep

    @property
    def ranks_are_equal(self) -> bool:
        return self._step <= self._rounds.warmup_steps

    def parameters(self) -> dict[str, Tensor]:
        if self.ranks_are_equal:
            return self._every_step.parameters()
        outer = {name: view for fragment in self.fragments for name, view in fragment.outer_parameters().items()}
        return {name: outer.get(name, parameter) for name, parameter in self._every_step.parameters().items()}

    @contextmanager
    def evaluation_parameters(self) -> Iterator[None]:
        with parameters_replaced(self._model, self.parameters()):
            yield

    # ---- state

    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        self._every_step.start(parameters)

    def log_numbers(self) -> dict[str, float]:
        squares = [(each.own_square, each.average_square) for each in self.fragments]
        own, average = (sum(column) for column in zip(*squares, strict=True))
        mean = math.fsum(self.communicator.all_gather_object(own)) / self._groups.count
        drift = math.sqrt(max(0.0, 1 - average / mean)) if mean else 0.0
        numbers = {"rounds": sum(each.rounds for each in self.fragments) / len(self.fragments), "drift": drift}
        return {**numbers, "left_out": self._pace.share_left_out()} if self._pace else numbers

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._every_step.state_dict(),
            "local_steps": {
                "every": self._rounds.every,
                "overlap": self._rounds.overlap,
                "warmup_steps": self._rounds.warmup_steps,
                "fragments": [fragment.state_dict() for fragment in self.fragments],
                "under_way": [name for each in self.fragments if each.is_under_way for name in each.outer_parameters()],
                "pace": self._pace.state_dict() if self._pace else None,
            },
        }

    def load_state_dict(self, state: dict[str, Any], step: int, as_saved: bool) -> None:
        self._step = step
        saved = state.get("local_steps")
        if self._chooses_interval and as_saved and saved is not None and step > saved["warmup_steps"]:
            chosen = {name: saved[name] for name in ("every", "overlap", "warmup_steps")}
            self._rounds = replace(self._rounds, **chosen)
            self._interval_is_known()
        elif self._chooses_interval:  # nothing was chosen, or for other ranks: first come steps that are timed
            self._rounds = replace(self._rounds, warmup_steps=max(self._rounds.warmup_steps, step + TIMED_STEPS))
        if self.ranks_are_equal:
            self._every_step.load_state_dict(state, step, as_saved)
        else:
            self._every_step.narrow_to(self._groups.own)
            self._has_begun = True
        for fragment in self.fragments:
            fragment.began_at = fragment.delivered = step
        self._goes_on = as_saved and saved is not None
        self._arrived = saved["under_way"] if saved is not None else []
        if saved is None or not self._goes_on:
            return
        if self._pace and saved["pace"]:
            self._pace.load_state_dict(saved["pace"])
        for fragment, own in zip(self.fragments, saved["fragments"], strict=True):
            fragment.load_state_dict(own)
            if fragment.outer_parameters().keys() & set(self._arrived):
                fragment.resume()

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.ranks_are_equal:
            return self._every_step.optimizer_state()
        state: dict[str, Tensor] = {}
        arrived = {f"average_difference.{name}" for name in self._arrived}
        for fragment in self.fragments:
            state.update(fragment.average_state())
            state.update({name: each for name, each in fragment.differences().items() if name in arrived})
        return state

    def rank_state(self) -> RankState:
        if self.ranks_are_equal:
            return self._every_step.rank_state()
        summed, dropped = dict[str, Tensor](), dict[str, Tensor]()
        for state in (fragment.rank_state() for fragment in self.fragments):
            summed.update(state.summed)
            dropped.update(state.dropped)
        return RankState(summed, averaged=optimizer_tensors(self._optimizer, self._model), dropped=dropped)

    def restored(self, residual_factor: float) -> None:
        if not self.ranks_are_equal and not self._goes_on:
            for fragment in self.fragments:
                fragment.restart(self._arrived)
        self._arrived = []
        if not self.ranks_are_equal:
            for residual in self.residuals():
                self._groups.move_to_leaders_(residual)
        self._every_step.restored(residual_factor)
