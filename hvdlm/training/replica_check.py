"""Compares the replicas of a trainer, and gives one that differs the others' parameters, if so set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.comm.replicas import ReplicaHealer, check_replicas

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class ReplicaCheck:
    """Of `train.check_replicas_every`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._healer = trainer, ReplicaHealer()

    def compare(self) -> None:
        """Raises JobError on all ranks if some differ that are not healed. Collective."""
        trainer = self._trainer
        if not trainer.config.train.heal_replicas:
            check_replicas(trainer.communicator, trainer.parameters, trainer.step, trainer.strategy.share)
            return
        state = trainer.optimizer_state().values()
        if said := self._healer.heal(trainer.communicator, trainer.parameters, state, trainer.step):
            trainer.model.update_low_precision_weights()
            trainer.write("event", message=said)
