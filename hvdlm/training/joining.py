"""Ranks that join others in training are given what these have: model, optimizer's state, step, all that is equal.

Of what a rank alone has (residuals) they begin with none. Every call is made by all ranks, new or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.privacy.accountant import Phase
from hvdlm.strategies.strategy import Strategy

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class SharedState(NamedTuple):
    """What is no tensor."""

    strategy: dict[str, Any]
    algorithm_costs: list[AlgorithmCost]
    loss_scale: dict[str, float]
    skipped_in_a_row: int
    unread: int
    seconds: float
    private_steps: list[Phase]


def share_state(trainer: Trainer, root: int) -> SharedState:
    """What rank `root` has, on all ranks; a new one has it in its `trainer` now, but for what concerns its strategy."""
    strategy = trainer.strategy
    own = SharedState(
        strategy.state_dict(),
        list(strategy.sync.algorithm_costs),
        trainer.loss_scale.state_dict(),
        trainer.skipped.in_a_row,
        trainer.unread,
        trainer.ending.seconds,
        trainer.privacy.history if trainer.privacy else [],
    )
    shared = trainer.communicator.broadcast_object(own, root)
    trainer.loss_scale.load_state_dict(shared.loss_scale)
    trainer.skipped.in_a_row = shared.skipped_in_a_row
    trainer.unread = shared.unread
    trainer.ending.restore(shared.seconds)
    if trainer.privacy:
        trainer.privacy.go_on(shared.private_steps)
        trainer.ending.keep_to_budget()
    return shared


def share_tensors(strategy: Strategy, root: int) -> None:
    """Parameters and all state of rank `root`, on new ranks, whose residuals are then zero; others keep their own."""
    communicator = strategy.communicator
    broadcast_tensors(communicator, [*strategy.parameters().values(), *strategy.optimizer_state().values()], root)
    own = strategy.rank_state().tensors().values()
    # Of these, too, some are equal on all ranks, such as the basis of powersgd
    broadcast_tensors(communicator, own if communicator.is_new else [each.clone() for each in own], root)
    if communicator.is_new:
        strategy.scale_residuals_(0.0)
