"""A rank has died: the others leave it out, and go on with the step that is under way (`comm.elastic`).

The samples of a step do not depend on who computes it. So a step that no rank has completed is taken back and computed
again by those that are left: no sample is lost, none is trained on twice. A rank completes a step once it has the norm
of its gradients, to which each rank gives its part, and no rank does so before it has the sum of all gradients. So
where one rank has completed a step, every other can: it has the sum, and is told the norm.

In local steps no rank waits for another, so a death is noticed in the next round, and some ranks may have come further
than others. What the dead rank has learned since its last round is lost with it: the others train on those samples
again, beside their own. What follows a step on all ranks together (a line of metrics, a checkpoint, a validation) ends
with a barrier, so that no rank has left another one behind in it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import Config
from hvdlm.data.loader import Loader
from hvdlm.data.rank_parts import RankParts
from hvdlm.errors import JobError
from hvdlm.strategies import make_strategy
from hvdlm.strategies.hidden_matrices import hidden_matrices
from hvdlm.training.due import Due
from hvdlm.training.joining import share_state, share_tensors
from hvdlm.training.residual_mirror import ResidualMirror

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

logger = logging.getLogger(__name__)


class _Progress(NamedTuple):
    """How far a rank has come."""

    number: int  # of the rank, which stays when others die
    name: str
    is_new: bool  # it is about to join, and has come nowhere
    step: int
    norm: Tensor  # of the last step that it has completed
    losses: list[tuple[float, int]]  # of that step, by rank
    due: Due  # after that step
    stop: bool
    parts: RankParts
    strategy: Any  # `Strategy.progress`


class Elastic:
    """Keeps a trainer going while ranks die; it has all that a rank needs to take a step back or to complete it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        communicator = trainer.communicator
        self.is_regroup_due = communicator.is_new  # before the next step, because hosts have come or gone
        self.number = communicator.rank  # stays when others die
        host = communicator.hosts[communicator.rank]
        self._name = f"process {os.getpid()} on {host}" if communicator.is_new else f"rank {self.number} on {host}"
        self._names = {rank: f"rank {rank} on {host}" for rank, host in enumerate(communicator.hosts)}
        # What some rank has found due after steps to which this one has not come yet, and whether to stop there
        self._later: dict[int, tuple[Due, bool]] = {}
        self._before: dict[str, Tensor] = {}  # what messages of a step change, as it was before
        self._sync_step = 0
        self._open = -1  # the step that has begun and may be taken back
        self._has_sums = False  # of that step
        self._losses: list[tuple[float, int]] = []  # of the last step: of each rank's tokens, and their number
        self._mirror = ResidualMirror() if trainer.config.comm.mirror_residuals else None
        self._residual_norms: dict[int, float] = {}  # of each rank, when a line of metrics was written

    # ---- one step

    def begin_step(self) -> None:
        """Keeps what is needed to take the step back, before its gradients are sent."""
        strategy = self._trainer.strategy
        if strategy.is_local:
            self._open = -1
            return
        self._open, self._has_sums = self._trainer.step, False
        self._sync_step = strategy.sync.step
        for name, tensor in strategy.step_state().items():
            if name in self._before:
                self._before[name].copy_(tensor)
            else:
                self._before[name] = tensor.clone()

    def norm(self) -> Tensor:
        """`Strategy.norm`, with whose message the ranks tell their losses. This rank has the sum of all gradients."""
        trainer = self._trainer
        if trainer.strategy.is_local:
            self._losses = []
            return trainer.strategy.norm()
        self._has_sums = True
        self._mirror_residuals(trainer.step + 1)
        numbers = [*trainer.own_loss(), trainer.communicator.hosts_have_changed]
        norm, told = trainer.strategy.norm_and_numbers(torch.tensor(numbers, dtype=torch.float64))
        self._losses = [(loss, int(tokens)) for loss, tokens, _ in told.tolist()]
        self.is_regroup_due = bool(told[:, 2].any())
        return norm

    def loss(self) -> tuple[float, int]:
        """What this rank adds to the loss of the last step and its tokens: after a local step its own; otherwise all of
        it on rank 0, nothing elsewhere.
        """
        if not self._losses:
            return self._trainer.own_loss()
        if self._trainer.communicator.rank:
            return 0.0, 0
        losses, tokens = zip(*self._losses, strict=True)
        return sum(losses), sum(tokens)

    def note_residuals(self) -> None:
        """How much ranks have not delivered, should one of them die. Collective."""
        norms = [float(torch.linalg.vector_norm(each)) for each in self._trainer.strategy.residuals()]
        self._residual_norms = dict(self._trainer.communicator.all_gather_object((self.number, math.hypot(*norms))))

    def add_due(self) -> None:
        """Adds what others have found due after the step that has ended."""
        if later := self._later.pop(self._trainer.step, None):
            self._require(self._trainer.step, *later)

    # ---- other ranks

    def regroup(self, loader: Loader) -> Loader:
        """Lets ranks join, or leave, before the next step: returns what reads this rank's part from now on."""
        if not self._trainer.communicator.is_new:
            self._trainer.saver.wait()  # rank 0 may be among those that leave
            with suppress(DeadRankError):  # others may be about to regroup already
                self._trainer.communicator.barrier()
        return self._go_on(loader, "left")

    def recover(self, error: DeadRankError, loader: Loader) -> Loader:
        """Goes on without the ranks that have died: returns what reads this rank's part from now on.

        If fewer than `comm.min_ranks` are left, they are to save and stop.
        """
        logger.debug("%s: %s", self._name, error)
        return self._go_on(loader, "died")

    def _go_on(self, loader: Loader, lost: str) -> Loader:
        """`lost`: what those have done that are no longer there."""
        noticed = time.monotonic()
        while True:
            try:
                return self._recover(noticed, loader, lost)
            except DeadRankError as another:
                lost = "died"
                logger.debug("%s, while it goes on: %s", self._name, another)

    def _recover(self, noticed: float, loader: Loader, lost: str) -> Loader:
        trainer, communicator, strategy = self._trainer, self._trainer.communicator, self._trainer.strategy
        communicator.regroup_()
        strategy.abandon()
        progress = self._agree()
        step = max(each.step for each in progress)
        if trainer.saver.recover():
            self._require(step, Due(save=True))
        before = max((each.parts for each in progress if not each.is_new), key=lambda each: each.changes)
        numbers = self._number(progress, before)
        gone = [number for number in before.ranks if number not in numbers]
        kept: set[int] = set()
        if self._mirror is not None:
            self._mirror.take_over(gone, strategy.residuals(), trainer.loss_scale.factor, step)
            kept.update(*communicator.all_gather_object(self._mirror.taken_over))
        if any(each.strategy is not None for each in progress):
            sent = strategy.go_on([each.strategy for each in progress])
        else:
            self._replace_strategy(progress)
            sent = step
        trainer.step_metrics.ranks_have_changed()
        parts, unlearned = before.regrouped(numbers, sent, step, trainer.ending.last_step)
        if communicator.rank == 0 and trainer.metrics is None and trainer.open_metrics is not None:
            trainer.metrics = trainer.open_metrics(trainer.step)
        if trainer.validation.was_cut_off(step):
            self._require(step, Due(validation=True))
        self.is_regroup_due = False
        said = _who([self._names[number] for number in gone], lost)
        said += _who([self._names[number] for number in numbers if number not in before.ranks], "joined")
        said = said or "ranks have regrouped: "
        said += f"{communicator.size} ranks go on from step {step}, after {time.monotonic() - noticed:.2f} s"
        said += self._losses_of([number for number in gone if number not in kept], step - sent, unlearned)
        trainer.write("event", message=said)
        communicator.barrier()  # who has died until here is told of, whatever happens next
        trainer.parts = parts
        if trainer.balance:
            trainer.balance.begin()
        self._mirror_residuals(step)
        trainer.strategy.send_again()
        if communicator.size < trainer.config.comm.min_ranks and step < trainer.ending.last_step:
            trainer.write("event", message=f"fewer than comm.min_ranks = {trainer.config.comm.min_ranks} are left")
            self._require(step, Due(save=step > 0), stop=True)
        loader.close()
        return trainer.open_loader()

    def _agree(self) -> list[_Progress]:
        """Completes the step under way if some rank has, otherwise takes it back; finds out what is still to be done
        after the last step of all. Returns the progress of all ranks. Collective.
        """
        trainer, strategy, is_new = self._trainer, self._trainer.strategy, self._trainer.communicator.is_new
        step = -1 if is_new else trainer.step
        came_to = step, trainer.norm.cpu(), self._losses, trainer.due, trainer.stop, trainer.parts, strategy.progress()
        own = _Progress(self.number, self._name, is_new, *came_to)
        progress: list[_Progress] = trainer.communicator.all_gather_object(own)
        first = max(progress, key=lambda each: each.step)
        if first.is_new:
            raise JobError("no rank that has trained is left: go on with --resume latest")
        if is_new:
            trainer.step, trainer.norm, self._losses = first.step, first.norm.to(trainer.device), first.losses
        elif trainer.step < first.step and not strategy.is_local:
            assert self._has_sums, "a rank has completed a step of whose gradients this one has no sum"
            self._losses = first.losses
            trainer.complete_step(first.norm.to(trainer.device))
        elif self._open == trainer.step:
            self._take_back()
        self._open = -1
        for each in progress:
            if each.step == first.step:
                self._require(first.step, each.due, each.stop)
        return progress

    def _number(self, progress: list[_Progress], before: RankParts) -> list[int]:
        """The numbers of all ranks, in their order; those that join get new ones."""
        known = max([before.known, *(each.number + 1 for each in progress if not each.is_new)])
        numbers: list[int] = []
        for each in progress:
            numbers.append(known if each.is_new else each.number)
            known += each.is_new
        self.number = numbers[self._trainer.communicator.rank]
        self._names.update(zip(numbers, (each.name for each in progress), strict=True))
        return numbers

    def _require(self, step: int, due: Due, stop: bool = False) -> None:
        """This is to be done after a step: the last one, or one to which this rank has still to come."""
        trainer = self._trainer
        if trainer.step == step:
            trainer.due.add(due)
            trainer.stop |= stop
            return
        known, stops = self._later.get(step, (Due(), False))
        known.add(due)
        self._later[step] = known, stops or stop

    def _losses_of(self, gone: list[int], steps: int, unlearned: int) -> str:
        """What is lost with ranks, as the end of a sentence: residuals, and sequences that nobody can make up for.

        `steps`: of which they had not sent what they had learned.
        """
        said = ""
        if norms := [self._residual_norms[rank] for rank in gone if self._residual_norms.get(rank)]:
            said += f"; a residual of norm {math.hypot(*norms):.3g}, when it was logged last, is lost"
        if unlearned:
            return f"{said}; what was learned from {unlearned} sequences of the last {steps} steps is lost"
        return f"{said}, and train again on what was theirs of the last {steps} steps" if steps else said

    def _mirror_residuals(self, steps: int) -> None:
        """As they are after so many steps. Collective."""
        if self._mirror is not None:
            trainer = self._trainer
            own, scale = trainer.strategy.residuals(), trainer.loss_scale.factor
            self._mirror.exchange(trainer.communicator, trainer.parts.ranks, own, scale, steps)

    def _take_back(self) -> None:
        strategy = self._trainer.strategy
        for name, tensor in strategy.step_state().items():
            tensor.copy_(self._before[name])
        strategy.sync.step = self._sync_step

    def _replace_strategy(self, progress: list[_Progress]) -> None:
        """The same strategy among the ranks that there are now, with what this rank had not delivered. Collective."""
        trainer, old, is_new = self._trainer, self._trainer.strategy, self._trainer.communicator.is_new
        old.release()
        some_are_new = any(each.is_new for each in progress)
        root = [each.is_new for each in progress].index(False)
        costs, state = old.sync.algorithm_costs, old.state_dict()  # measuring costs takes longer than all else here
        if some_are_new:
            shared = share_state(trainer, root)
            costs, state = shared.algorithm_costs, shared.strategy
        new = make_strategy(trainer.model, trainer.optimizer, trainer.mesh, trainer.config, trainer.device, costs)
        try:
            new.load_state_dict(state, trainer.step, as_saved=False)
            kept = {} if is_new else {**old.optimizer_state(), **old.rank_state().tensors()}
            for name, tensor in {**new.optimizer_state(), **new.rank_state().tensors()}.items():
                if name in kept and kept[name] is not tensor:
                    tensor.copy_(kept[name])
            if some_are_new:
                share_tensors(new, root)
                broadcast_tensors(trainer.communicator, trainer.ema.state().values(), root)
            elif trainer.config.optimizer.algorithm == "muon":
                # Each may have made the last updates by itself, and hosts of unlike kinds do not round alike
                updated = [*hidden_matrices(trainer.model).values(), *trainer.ema.state().values()]
                broadcast_tensors(trainer.communicator, updated, root)
            new.restored(1.0)
        except DeadRankError:
            new.abandon()
            new.release()
            raise
        trainer.strategy = new
        trainer.communicator.is_new = False
        self._before = {}


def check_elastic(config: Config, communicator: Communicator) -> None:
    """Raises JobError on all ranks if `comm.elastic` asks for what this job's engine or launcher does not have."""
    if not config.comm.elastic:
        return
    if communicator.size > 1 and not communicator.supports("shrink"):
        raise JobError(
            f"comm.elastic = true needs ranks that outlive one that dies: start the job by mpirun --with-ft ulfm and "
            f"engine mpi, or by horovodrun --host-discovery-script (this is engine {communicator.engine})"
        )
    if communicator.supports("join") and config.local_steps.every:
        raise JobError(
            "comm.elastic = true goes with local steps only under mpirun --with-ft ulfm: leave out local_steps.every"
        )


def _who(names: list[str], what: str) -> str:
    """Of whom something is to be told, as the beginning of a sentence."""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} {what}: " if names else ""
