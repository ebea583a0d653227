"""Compares the replicas of a trainer, and gives one that differs the others' parameters, if so set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.comm.replicas import ReplicaHealer, check_replicas
from hvdlm.errors import JobError

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class ReplicaCheck:
    """Of `train.check_replicas_every`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._healer = trainer, ReplicaHealer()

    def compare(self) -> None:
        """Raises JobError on all ranks if some differ that are not healed. Collective."""
        trainer = self._trainer
        if trainer.pipeline is None:
            self._compare()
            return
        error = None
        try:
            self._compare()
        except JobError as failure:  # of this stage; the others' replicas may be equal
            error = str(failure)
        raise_on_all_ranks(trainer.communicator, trainer.communicator.all_gather_object(error))

    def _compare(self) -> None:
        trainer = self._trainer
        if not trainer.config.train.heal_replicas:
            check_replicas(trainer.readers, trainer.parameters, trainer.step)
            return
        state = trainer.optimizer_state().values()
        if said := self._healer.heal(trainer.readers, trainer.parameters, state, trainer.step):
            trainer.model.update_low_precision_weights()
            trainer.write("event", message=said)
