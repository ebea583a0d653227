"""A rank has died: the others leave it out, and go on with the step that is under way (`comm.elastic`).

The samples of a step do not depend on who computes it. So a step that no rank has completed is taken back and computed
again by those that are left: no sample is lost, none is trained on twice. A rank completes a step once it has the norm
of its gradients, to which each rank gives its part, and no rank does so before it has the sum of all gradients. So
where one rank has completed a step, every other can: it has the sum, and is told the norm.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError
from hvdlm.config import Config
from hvdlm.data.loader import Loader
from hvdlm.errors import JobError
from hvdlm.strategies import make_strategy
from hvdlm.training.joining import share_state, share_tensors

if TYPE_CHECKING:
    from hvdlm.training.trainer import Due, Trainer

logger = logging.getLogger(__name__)


class _Standing(NamedTuple):
    """How far a rank has come."""

    step: int
    norm: Tensor  # of the last step that it has completed
    losses: list[tuple[float, int]]  # of that step, by rank
    due: Due
    stop: bool
    is_new: bool  # it is about to join


class Elastic:
    """Keeps a trainer going while ranks die; it has all that a rank needs to take a step back or to complete it."""

    def __init__(self, trainer: Trainer) -> None:
        """Collective."""
        self._trainer = trainer
        communicator = trainer.communicator
        self.is_regroup_due = communicator.is_new  # before the next step, because hosts have come or gone
        self._name = f"rank {communicator.rank} on {communicator.hosts[communicator.rank]}"
        if communicator.is_new:
            self._name = f"process {os.getpid()} on {communicator.hosts[communicator.rank]}"
        self._names = communicator.all_gather_object(self._name)
        self._before: dict[str, Tensor] = {}  # what messages of a step change, as it was before
        self._sync_step = 0
        self._open = -1  # the step that has begun and may be taken back
        self._has_sums = False  # of that step
        self._losses: list[tuple[float, int]] = []  # of the last step: of each rank's tokens, and their number

    # ---- one step

    def begin_step(self) -> None:
        """Keeps what is needed to take the step back, before its gradients are sent."""
        self._open, self._has_sums = self._trainer.step, False
        strategy = self._trainer.strategy
        self._sync_step = strategy.sync.step
        for name, tensor in strategy.step_state().items():
            if name in self._before:
                self._before[name].copy_(tensor)
            else:
                self._before[name] = tensor.clone()

    def have_sums(self) -> None:
        """This rank has the sum of all gradients. Collective."""
        self._has_sums = True
        loss, tokens = self._trainer.own_loss()
        communicator = self._trainer.communicator
        # As whole numbers of 64 bits, which every engine sends
        own = torch.tensor(struct.unpack("<qqq", struct.pack("<dqq", loss, tokens, communicator.hosts_have_changed)))
        gathered = communicator.all_gather(own).tolist()
        *own_losses, changed = zip(
            *(struct.unpack("<dqq", struct.pack("<qqq", *each)) for each in gathered), strict=True
        )
        self._losses, self.is_regroup_due = list(zip(*own_losses, strict=True)), any(changed)

    def loss(self) -> tuple[float, int]:
        """What this rank adds to the loss of the last step and its tokens: all of it on rank 0, nothing elsewhere."""
        if self._trainer.communicator.rank:
            return 0.0, 0
        losses, tokens = zip(*self._losses, strict=True)
        return sum(losses), sum(tokens)

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
        trainer, communicator = self._trainer, self._trainer.communicator
        communicator.shrink_()
        trainer.strategy.abandon()
        names = communicator.all_gather_object(self._name)
        standings = self._agree()
        trainer.saver.recover()
        self._replace_strategy(standings)
        loader.close()
        loader = trainer.open_loader()
        if communicator.rank == 0 and trainer.metrics is None and trainer.open_metrics is not None:
            trainer.metrics = trainer.open_metrics(trainer.step)
        gone = [name for name in self._names if name not in names]
        joined = [name for name in names if name not in self._names]
        end = f"{communicator.size} ranks go on from step {trainer.step}, after {time.monotonic() - noticed:.2f} s"
        said = f"{_who(gone, lost)}{_who(joined, 'joined')}" or "ranks have regrouped: "
        trainer.write("event", message=said + end)
        self._names, self.is_regroup_due = names, False
        if communicator.size < trainer.config.comm.min_ranks:
            trainer.write("event", message=f"fewer than comm.min_ranks = {trainer.config.comm.min_ranks} are left")
            trainer.stop, trainer.due.save = True, trainer.step > 0
        return loader

    def _agree(self) -> list[_Standing]:
        """Completes the step under way if some rank has, otherwise takes it back; finds out what is still to be done
        after it. Collective; returns how far each rank had come.
        """
        trainer, is_new = self._trainer, self._trainer.communicator.is_new
        own = _Standing(
            -1 if is_new else trainer.step, trainer.norm.cpu(), self._losses, trainer.due, trainer.stop, is_new
        )
        standings: list[_Standing] = trainer.communicator.all_gather_object(own)
        first = max(standings, key=lambda each: each.step)
        if first.is_new:
            raise JobError("no rank that has trained is left: go on with --resume latest")
        if is_new:
            trainer.step, trainer.norm, self._losses = first.step, first.norm.to(trainer.device), first.losses
        elif trainer.step < first.step:
            assert self._has_sums, "a rank has completed a step of whose gradients this one has no sum"
            self._losses = first.losses
            trainer.complete_step(first.norm.to(trainer.device))
        elif self._open == trainer.step:
            self._take_back()
        self._open = -1
        for name in vars(trainer.due):
            setattr(trainer.due, name, any(getattr(each.due, name) for each in standings))
        trainer.stop = any(each.stop for each in standings)
        return standings

    def _take_back(self) -> None:
        strategy = self._trainer.strategy
        for name, tensor in strategy.step_state().items():
            tensor.copy_(self._before[name])
        strategy.sync.step = self._sync_step

    def _replace_strategy(self, standings: list[_Standing]) -> None:
        """The same strategy among the ranks that there are now, with what this rank had not delivered. Collective."""
        trainer, old, is_new = self._trainer, self._trainer.strategy, self._trainer.communicator.is_new
        some_are_new = any(each.is_new for each in standings)
        root = [each.is_new for each in standings].index(False)
        costs, state = old.sync.algorithm_costs, old.state_dict()  # measuring costs takes longer than all else here
        if some_are_new:
            shared = share_state(trainer, root)
            costs, state = shared.algorithm_costs, shared.strategy
        new = make_strategy(trainer.model, trainer.optimizer, trainer.communicator, trainer.config, costs)
        try:
            new.load_state_dict(state, trainer.step, as_saved=False)
            kept = {} if is_new else {**old.optimizer_state(), **old.rank_state().tensors()}
            for name, tensor in {**new.optimizer_state(), **new.rank_state().tensors()}.items():
                if name in kept and kept[name] is not tensor:
                    tensor.copy_(kept[name])
            if some_are_new:
                share_tensors(new, root)
            new.restored(1.0)
        except DeadRankError:
            new.abandon()
            raise
        trainer.strategy, trainer.sync = new, new.sync
        trainer.communicator.is_new = False
        self._before = {}


def check_elastic(config: Config, communicator: Communicator) -> None:
    """Raises JobError on all ranks if `comm.elastic` asks for what this job's engine or launcher does not have."""
    if config.comm.elastic and communicator.size > 1 and not communicator.supports("shrink"):
        raise JobError(
            f"comm.elastic = true needs ranks that outlive one that dies: start the job by mpirun --with-ft ulfm and "
            f"engine mpi, or by horovodrun --host-discovery-script (this is engine {communicator.engine})"
        )


def _who(names: list[str], what: str) -> str:
    """Of whom something is to be told, as the beginning of a sentence."""
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} {what}: " if names else ""
