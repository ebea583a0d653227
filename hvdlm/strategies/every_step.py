"""The ranks combine the gradients of every step, so that all hold the same model: synchronous data parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.gradients.bucket_codecs import OwnCodec
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.sync import GradientSync, Traffic
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.optimizer import (
    deal_out_among,
    leave_out_if,
    optimizer_tensors,
    sent_bytes,
    set_learning_rate,
)
from hvdlm.strategies.penalties import add_penalties_
from hvdlm.strategies.replaced_parameters import parameters_replaced
from hvdlm.strategies.step_agreement import StepAgreement
from hvdlm.strategies.strategy import RankState, Report, StepEnd, Strategy


class EveryStep(Strategy):
    """Sums gradients by a `GradientSync`, and steps on every rank alike."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        config: Config,
        own_codec: OwnCodec | None = None,
        algorithm_costs: Sequence[AlgorithmCost] = (),
    ) -> None:
        """Takes over `.grad` of all trainable parameters. Collective.

        `own_codec`: of some of them. `algorithm_costs`: see `open_channels`.
        """
        self._model, self._optimizer, self.communicator = model, optimizer, communicator
        self.everyone = communicator  # all ranks of the job, also those that share a model with others
        self._parameters = dict(model.named_parameters())
        self._settings = config.optimizer
        self.sync = GradientSync(model, communicator, config.comm, config.compression, own_codec, algorithm_costs)
        self.sync.only_if_finite = config.train.precision == "fp16" and bool(self.sync.codec_state())
        deal_out_among(optimizer, communicator)
        self._agreement = StepAgreement()

    def begin_step(self, own: Report) -> Work[int]:
        totals = self._agreement.begin(self.everyone, own)
        self.sync.zero_grad()
        return totals

    def narrow_to(self, communicator: Communicator) -> None:
        """From the next step on combines the work of the ranks of `communicator` alone. Collective."""
        self.communicator = self.everyone = communicator
        self.sync.narrow_to(communicator)
        deal_out_among(self._optimizer, communicator)

    def set_last_micro_batch(self) -> None:
        self.sync.set_last_micro_batch()

    def wait(self) -> None:
        self.sync.wait()

    @property
    def traffic(self) -> Traffic:
        traffic = self.sync.traffic
        return replace(traffic, wire_bytes=traffic.wire_bytes + sent_bytes(self._optimizer))

    @property
    def channels(self) -> list[Channel]:
        return self.sync.channels

    def norm(self) -> Tensor:
        return self.sync.norm()

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self.sync.norm_and_numbers(numbers)

    def scale_residuals_(self, factor: float) -> None:
        self.sync.scale_residuals_(factor)

    def leave_out_if(self, found: Tensor) -> bool:
        return leave_out_if(self._optimizer, found)

    def apply(self, rate: float) -> None:
        add_penalties_((each for each in self._parameters.values() if each.dim() >= 2), self._settings)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()

    def end_step(self) -> StepEnd:
        self._model.update_low_precision_weights()
        return self._agreement.end()

    def arrive(self) -> None:
        pass  # it has, when `wait` returns

    def finish(self) -> int:
        return 0

    def close(self) -> None:
        self.sync.close()

    def abandon(self) -> None:
        self.sync.abandon()
        deal_out_among(self._optimizer, None)

    def release(self) -> None:
        self.sync.release()

    def step_state(self) -> dict[str, Tensor]:
        return self.sync.codec_state()

    def residuals(self) -> list[Tensor]:
        return self.sync.residuals()

    @property
    def ranks_are_equal(self) -> bool:
        return True

    def parameters(self) -> dict[str, Tensor]:
        return dict(self._parameters)

    def replaced(self, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return parameters_replaced(self._model, parameters)

    @torch.no_grad()
    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        if parameters is None:
            broadcast_tensors(self.communicator, self._parameters.values())
        for name, values in parameters or ():
            self._parameters[name].copy_(values)
        self._model.update_low_precision_weights()

    def log_numbers(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.sync.state_dict()}

    def load_state_dict(self, state: dict[str, Any], step: int, as_saved: bool) -> None:
        self.sync.load_state_dict(state["gradients"])

    def optimizer_state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self._optimizer, self._model)

    def rank_state(self) -> RankState:
        return RankState(summed=self.sync.codec_state())

    def restored(self, residual_factor: float) -> None:
        self.sync.restore_residuals_(residual_factor)
        self._model.update_low_precision_weights()
