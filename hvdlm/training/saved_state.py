"""What a checkpoint holds of a trainer, and a trainer's state from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import LocalStepsSection, ParallelSection
from hvdlm.strategies.held_parts import HeldParts
from hvdlm.strategies.strategy import RankState
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.rank_states import read_equal_state, read_parts, scatter_from_checkpoint

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def restore(trainer: Trainer, source: Checkpoint | None, state: dict[str, Any]) -> list[str]:
    """Restores a checkpoint, which rank 0 has open as `source`; all ranks have its `state`. Collective.

    Returns what the user is to be told. Raises JobError if its weights are of no use.
    """
    communicator, strategy, loss_scale = trainer.communicator, trainer.strategy, trainer.loss_scale
    size = state["world_size"]
    combines_alike = LocalStepsSection(**state["config"].get("local_steps", {})) == trainer.config.local_steps
    as_saved = combines_alike and size == communicator.size
    strategy.load_state_dict(state, state["step"], as_saved)
    equal = {**strategy.parameters(), **trainer.optimizer_state()}
    held = held_parts_of(trainer)
    if held is not None:
        read_parts(communicator, source, equal, held, size)
    else:
        on_rank_0(communicator, lambda: read_equal_state(source, equal, size))
        broadcast_tensors(communicator, equal.values())
    if not state["config"]["train"].get("ema"):
        trainer.ema.reset()
    loss_scale.load_state_dict(state["loss_scale"])
    trainer.unread = state.get("unread", 0)
    trainer.ending.restore(state.get("seconds", 0.0))
    if trainer.privacy:
        trainer.privacy.go_on(state["privacy"]["history"])
    if "parts" in state:
        end = trainer.ending.last_step
        balance = trainer.config.train.balance
        trainer.parts.load_state_dict(state["parts"], state["step"], end, size == communicator.size, balance)
    own, sentences = own_state(trainer), []
    if _divides_model_alike(trainer, state) or not own.summed:
        scatter_from_checkpoint(communicator, source, own, size)
    else:
        sentences.append("what codecs had not delivered is left out: ranks divided the model in another way")
    if "loss_scale" in own.dropped:
        loss_scale.load_tensor(own.dropped["loss_scale"])
    strategy.restored(loss_scale.factor / state["loss_scale"]["factor"])  # precision may differ
    trainer.step = trainer.saver.step = state["step"]
    if as_saved or state.get("ranks_are_equal", True):
        return sentences
    return [
        *sentences,
        "training goes on from the parameters that were averaged last, with the mean of the moments: the number of "
        "ranks or [local_steps] was another, so what each rank has learned since is not used",
    ]


def _divides_model_alike(trainer: Trainer, state: dict[str, Any]) -> bool:
    """Whether a rank's residuals are of numbers that it, or any rank, still has a residual of."""
    saved, own = ParallelSection(**state["config"].get("parallel", {})), trainer.config.parallel
    divides = max(saved.tensor, own.tensor, saved.pipeline, own.pipeline) > 1
    return not divides or (saved == own and state["world_size"] == trainer.communicator.size)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The contents of a checkpoint's state.json."""
    return {
        "step": trainer.step,
        "data": {"seed": trainer.config.train.seed, "batch": trainer.step},
        "loss_scale": trainer.loss_scale.state_dict(),
        **trainer.strategy.state_dict(),
        "unread": trainer.unread,
        "seconds": trainer.ending.seconds,
        "parts": trainer.parts.state_dict(),
        **({"privacy": trainer.privacy.state_dict()} if trainer.privacy else {}),
        "ranks_are_equal": trainer.strategy.ranks_are_equal,
        "config": trainer.config.model_dump(),
        "vocab_size": trainer.model.vocab_size,
        "world_size": trainer.communicator.size,
        "fingerprint": trainer.data.fingerprint,
        "versions": checkpoint.versions(),
    }


def held_parts_of(trainer: Trainer) -> HeldParts | None:
    """What this rank holds of a trainer's parameters and optimizer state; None: all."""
    held = trainer.strategy.held_parts()
    return held.with_kind("ema") if held and trainer.config.train.ema else held


def own_state(trainer: Trainer) -> RankState:
    """What each rank has of its own; its loss scale, too, where ranks step by gradients of their own."""
    state = trainer.strategy.rank_state()
    if trainer.loss_scale.is_dynamic and not trainer.strategy.ranks_are_equal:
        state.dropped["loss_scale"] = trainer.loss_scale.tensor()
    return state
