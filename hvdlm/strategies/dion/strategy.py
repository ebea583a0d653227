"""Matrices are trained by Dion, whose ranks combine their momenta; all other parameters by AdamW, as in every_step.py.

`GradientSync` sends both during the backward pass: buckets of matrices, which `MatrixMomentum` (momentum.py) turns into
the update of all ranks; and buckets of all other gradients, by `compression.codec`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.bucket_codecs import OwnCodec
from hvdlm.gradients.codecs.registry import bucket_bytes
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.dion.matrices import matrix_rank
from hvdlm.strategies.dion.momentum import MatrixMomentum
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.hidden_matrices import hidden_matrices
from hvdlm.strategies.strategy import Report
from hvdlm.strategies.update_loops import add_scaled_


class Dion(EveryStep):
    """`optimizer` steps all parameters but the hidden matrices."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        config: Config,
        algorithm_costs: Sequence[AlgorithmCost] = (),
    ) -> None:
        """Takes over `.grad` of all trainable parameters. Collective. `algorithm_costs`: see `open_channels`."""
        self._batch_sizes, self._context_length = config.train.batch_sizes, config.model.context_length
        self._momenta: list[MatrixMomentum] = []
        rank = matrix_rank(config.optimizer, config.model)

        def make_momentum(bucket: Bucket) -> MatrixMomentum:
            momentum = MatrixMomentum(bucket, config.compression, rank, config.optimizer.dion_momentum)
            self._momenta.append(momentum)
            return momentum

        low_rank = config.compression.model_copy(update={"codec": "powersgd"})  # its messages are as large
        nbytes = bucket_bytes(config.comm, low_rank, communicator.node_count, model.output_weight.device.type)
        own = OwnCodec(frozenset(hidden_matrices(model)), nbytes, make_momentum)
        super().__init__(model, optimizer, communicator, config, own, algorithm_costs)

    def begin_step(self, own: Report) -> Work[int]:
        return super().begin_step(own).then(self._note_tokens)

    def _note_tokens(self, tokens: int) -> int:
        """Gradients enter the momentum as those of the mean over all tokens of their step."""
        nominal_tokens = self._batch_sizes.size(self.sync.step) * self._context_length
        for momentum in self._momenta:
            momentum.gradient_scale = nominal_tokens / max(1, tokens)
        return tokens

    def norm(self) -> Tensor:
        """That of the gradients that AdamW steps by, as no rank has the sum of the others; NaN if an update is."""
        return self._mark(super().norm())

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        norm, told = super().norm_and_numbers(numbers)
        return self._mark(norm), told

    def _mark(self, norm: Tensor) -> Tensor:
        """NaN if an update is not finite, otherwise `norm`."""
        marks = torch.stack([momentum.bucket.buffer[0] for momentum in self._momenta])
        return norm + 0 * marks.sum()

    def leave_out_if(self, found: Tensor) -> bool:
        return False  # updates of matrices are not AdamW's

    def apply(self, rate: float) -> None:
        settings = self._settings
        with torch.no_grad():
            for bucket in (momentum.bucket for momentum in self._momenta):
                for parameter, update in zip(bucket.parameters, bucket.split(bucket.buffer), strict=True):
                    rows, columns = parameter.shape
                    parameter.mul_(1 - rate * settings.weight_decay)
                    add_scaled_(parameter, update, -rate * settings.dion_lr_ratio * math.sqrt(rows / columns))
        super().apply(rate)

    def optimizer_state(self) -> dict[str, Tensor]:
        return {**super().optimizer_state(), **self._right_factors()}

    def step_state(self) -> dict[str, Tensor]:
        return {**super().step_state(), **self._right_factors()}

    def _right_factors(self) -> dict[str, Tensor]:
        return {name: factor for momentum in self._momenta for name, factor in momentum.right_factors().items()}
