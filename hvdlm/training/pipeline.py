"""The passes of a trainer whose ranks have some stages of the model each, `parallel.pipeline`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hvdlm.comm.mesh import Mesh
from hvdlm.data.loader import Batch
from hvdlm.model.transformer import document_ids
from hvdlm.parallel.pipeline.executor import MicroBatch, Pipeline
from hvdlm.parallel.pipeline.stage_model import StageModel
from hvdlm.training.model import seed_dropout

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class PipelinePasses:
    """Takes the micro-batches of a trainer through the stages; all ranks of a pipeline have read the same."""

    def __init__(self, trainer: Trainer, mesh: Mesh) -> None:
        """Collective."""
        assert isinstance(trainer.model, StageModel)
        self._trainer, self._model = trainer, trainer.model
        self.stages = mesh.shape["pipeline"]
        activity = trainer.communicator.activity
        self._pipeline = Pipeline(self._model, mesh["pipeline"], trainer.config.parallel, activity)

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank is the one of its pipeline that tells others of tokens and their loss."""
        return self._model.has_last_stage

    def train(self, micro_batches: Sequence[tuple[Tensor, Tensor]], factor: float) -> list[Tensor]:
        """The losses of micro-batches, sums over tokens, on the last stage, and none elsewhere.

        micro_batches: inputs and targets, (b, T) each. factor: by what the loss is multiplied that is differentiated.
        """
        trainer = self._trainer
        seed, stages = trainer.config.train.seed, trainer.config.parallel.stages

        def seed_pass(micro_batch: int, stage: int) -> None:
            passes_before = (trainer.readers.rank * len(micro_batches) + micro_batch) * stages + stage
            seed_dropout(seed, trainer.step, passes_before)

        return self._pipeline.train(
            [self._micro_batch(*each) for each in micro_batches],
            lambda hidden, targets: trainer.loss(hidden, targets, factor),
            factor,
            trainer.timer,
            trainer.strategy.set_last_micro_batch,
            seed_pass,
            trainer.strategy.end_pass,
        )

    def complete_gradients(self) -> None:
        """Adds up what two stages have of the gradient of one matrix, when they are sums over replicas."""
        self._pipeline.add_tied_gradients(self._trainer.parameters)

    def evaluate(self, batches: Sequence[Batch], visit: Callable[[Batch, Tensor], None]) -> None:
        """Calls `visit` on the last stage with each batch and its hidden states, (b, T, D)."""
        device, waiting = self._model.device, iter(batches)
        parts = [self._micro_batch(each.inputs.to(device), each.targets.to(device)) for each in batches]
        self._pipeline.evaluate(parts, lambda hidden, _: visit(next(waiting), hidden))

    def _micro_batch(self, inputs: Tensor, targets: Tensor) -> MicroBatch:
        masks = self._model.config.document_mask
        return MicroBatch(inputs, targets, document_ids(inputs, self._trainer.data.eos_id) if masks else None)
