"""Compares the replicas of a trainer, and gives one that differs the others' parameters, if so set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.comm.replicas import ReplicaHealer, check_replicas
from hvdlm.parallel.tensor.model import TensorParallelTransformer

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
            parallel, mesh = trainer.config.parallel, trainer.mesh
            part = mesh.place("data") if parallel.is_used else None
            check_replicas(trainer.communicator, trainer.parameters, trainer.step, part)
            if isinstance(trainer.model, TensorParallelTransformer) and not parallel.shard:
                # Each stage of a pipeline has others
                same = trainer.model.replicated_parameters()
                check_replicas(trainer.communicator, same, trainer.step, mesh.place("data", "tensor"))
            return
        state = trainer.optimizer_state().values()
        if said := self._healer.heal(trainer.communicator, trainer.parameters, state, trainer.step):
            trainer.model.update_low_precision_weights()
            trainer.write("event", message=said)
