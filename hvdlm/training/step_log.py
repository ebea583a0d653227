"""The line that a trainer writes of a step, and what stands out in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.data.cached_split import CachedSplit, ReadCount
from hvdlm.training.loss_spikes import LossSpikes
from hvdlm.training.stragglers import Stragglers

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class StepLog:
    """Writes records of kind "train", and events about losses that stand out and ranks that are slow."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loss_spikes, self._stragglers = LossSpikes(), Stragglers()
        self._counted = ReadCount(0, 0)

    def write(self, rate: float) -> None:
        """Of the last step, which was done with this learning rate. Collective."""
        trainer = self._trainer
        loss = trainer.elastic.loss() if trainer.elastic else trainer.own_loss()
        numbers = {**trainer.step_metrics.collect(*loss), **trainer.strategy.log_numbers()}
        if trainer.privacy and trainer.metrics is not None and trainer.config.privacy.has_noise:
            numbers["epsilon"] = trainer.privacy.epsilon(trainer.step)
        if trainer.config.data.cache and isinstance(trainer.data.train, CachedSplit):
            numbers["cache_hits"] = self._share_of_hits(trainer.data.train.count)
        trainer.write("train", lr=rate, grad_norm=float(trainer.norm), tokens=trainer.tokens_done, **numbers)
        if score := self._loss_spikes.add(numbers["loss"]):
            batch = trainer.step - 1
            said = f"the loss of batch {batch}, {numbers['loss']:.4f}, is {score:.1f} standard deviations above"
            trainer.write("event", message=f"{said} the mean of the last ones")
        if slow := self._stragglers.add(trainer.step_metrics.compute_seconds):
            rank, ratio = slow
            where = f"rank {rank} on {trainer.communicator.hosts[rank]}"
            said = f"{where} is a straggler: it computes {ratio:.1f} times as long as the others"
            trainer.write("event", message=said)
        if trainer.elastic:
            trainer.elastic.note_residuals()

    def _share_of_hits(self, count: ReadCount) -> float | None:
        """Of what all ranks have read since the last line, the share that was of copies. Collective."""
        own = count.reads - self._counted.reads, count.hits - self._counted.hits
        reads, hits = map(sum, zip(*self._trainer.communicator.all_gather_object(own), strict=True))
        self._counted = count
        return hits / reads if reads else None
