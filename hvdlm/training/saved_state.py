"""A trainer's state to a checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import LocalStepsSection
from hvdlm.errors import JobError
from hvdlm.strategies.strategy import RankState
from hvdlm.training import checkpoint
from hvdlm.training.rank_states import gather_to_files, read_equal_state, scatter_from_checkpoint

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def restore(trainer: Trainer, source: checkpoint.Checkpoint | None, state: dict[str, Any]) -> list[str]:
    """Restores a checkpoint, which rank 0 has open as `source`; all ranks have its `state`. Collective.

    Returns what the user is to be told. Raises JobError if its weights are of no use.
    """
    communicator, strategy, loss_scale = trainer.communicator, trainer.strategy, trainer.loss_scale
    size = state["world_size"]
    combines_alike = LocalStepsSection(**state["config"].get("local_steps", {})) == trainer.config.local_steps
    as_saved = combines_alike and size == communicator.size
    strategy.load_state_dict(state, state["step"], as_saved)
    equal = {**strategy.parameters(), **strategy.optimizer_state()}
    on_rank_0(communicator, lambda: read_equal_state(source, equal, size))
    broadcast_tensors(communicator, equal.values())
    loss_scale.load_state_dict(state["loss_scale"])
    own = _rank_state(trainer)
    scatter_from_checkpoint(communicator, source, own, size)
    if "loss_scale" in own.dropped:
        loss_scale.load_tensor(own.dropped["loss_scale"])
    strategy.restored(loss_scale.factor / state["loss_scale"]["factor"])  # precision may differ
    trainer.step = trainer.saved_step = state["step"]
    if as_saved or state.get("ranks_are_equal", True):
        return []
    return [
        "training goes on from the parameters that were averaged last, with the mean of the moments: the number of "
        "ranks or [local_steps] was another, so what each rank has learned since is not used"
    ]


def save(trainer: Trainer) -> None:
    """Raises JobError, and leaves the checkpoints as they are, if the weights are of no use. Collective."""
    communicator, config = trainer.communicator, trainer.config
    equal = trainer.parameters, trainer.strategy.optimizer_state()
    if name := checkpoint.not_finite(equal[0]):
        raise JobError(
            f"{name} holds NaN or infinite numbers after step {trainer.step}, which is not saved: lower optimizer.lr, "
            "and resume from the last checkpoint"
        )
    parent, keep = checkpoint.directory(config.train.run_dir), config.checkpoint.keep
    ranks = gather_to_files(communicator, _rank_state(trainer).tensors(), parent)

    def write() -> Path:
        state, tokenizer = _state(trainer), trainer.tokenizer
        return checkpoint.save(parent, trainer.step, *equal, state, tokenizer, keep, ranks)

    trainer.write("event", message=f"saved {on_rank_0(communicator, write)}")
    trainer.saved_step = trainer.step


def _state(trainer: Trainer) -> dict[str, Any]:
    """The contents of a checkpoint's state.json."""
    return {
        "step": trainer.step,
        "data": {"seed": trainer.config.train.seed, "batch": trainer.step},
        "loss_scale": trainer.loss_scale.state_dict(),
        **trainer.strategy.state_dict(),
        "ranks_are_equal": trainer.strategy.ranks_are_equal,
        "config": trainer.config.model_dump(),
        "vocab_size": trainer.model.vocab_size,
        "world_size": trainer.communicator.size,
        "fingerprint": trainer.data.fingerprint,
        "versions": checkpoint.versions(),
    }


def _rank_state(trainer: Trainer) -> RankState:
    """What each rank has of its own; its loss scale, too, where ranks step by gradients of their own."""
    state = trainer.strategy.rank_state()
    if trainer.loss_scale.is_dynamic and not trainer.strategy.ranks_are_equal:
        state.dropped["loss_scale"] = trainer.loss_scale.tensor()
    return state
