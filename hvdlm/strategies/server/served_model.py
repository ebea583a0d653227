"""The whole model of servers that are processes of their own: what is validated, saved and restored there.

Its gradients come from workers, by letters. Several servers have a part of it each, which they save; they gather it to
validate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.sync import Traffic
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.held_parts import HeldParts
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.strategy import RankState, Report, StepEnd, Strategy


class ServedModel(Strategy):
    """A model, and what this server keeps of it, `owned`: of a single server that is all, in the model's memory."""

    def __init__(self, model: Transformer, servers: Communicator, group: ServerGroup, config: Config) -> None:
        self.communicator, self._model = servers, model
        self.owned = OwnedParameters(model, config, group)
        self._step = 0  # of the last boundary
        self._is_local = bool(config.local_steps.every)
        self.start((name, each.detach()) for name, each in model.named_parameters())
        for name, parameter in model.named_parameters() if servers.size == 1 else ():
            parameter.data = self.owned.parameters[name].view(parameter.shape)

    # ---- one step

    def begin_step(self, own: Report) -> Work[int]:
        self.owned.zero_grad()
        return Work.done(own.tokens)

    def set_last_micro_batch(self) -> None:
        pass  # workers make the passes

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass  # gradients are on the CPU

    @property
    def traffic(self) -> Traffic:
        return Traffic(dense_bytes=0, wire_bytes=0, codec_seconds=0.0, first_sent=0.0)

    def norm(self) -> Tensor:
        return torch.tensor(self.owned.norm())

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(), numbers[None]

    @property
    def channels(self) -> list[Channel]:
        return []

    def scale_(self, factor: float | Tensor) -> None:
        self.owned.scale_(float(factor))

    def scale_residuals_(self, factor: float) -> None:
        pass  # workers have them

    def leave_out_if(self, found: Tensor) -> bool:
        return False

    def apply(self, rate: float) -> None:
        self.owned.step(1.0, rate)

    def end_step(self) -> StepEnd:
        return StepEnd(stop=False, save=False, unread=0, ranks_have_met=True)

    def arrive(self) -> None:
        pass

    def finish(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def release(self) -> None:
        pass

    def step_state(self) -> dict[str, Tensor]:
        return {}

    def residuals(self) -> list[Tensor]:
        return []

    # ---- serving

    def meet(self, step: int) -> None:
        """All shares of so many batches have counted."""
        self._step = step

    # ---- the parameters to keep, and state

    @property
    def ranks_are_equal(self) -> bool:
        return not self._is_local  # workers have moments of their own

    def held_parts(self) -> HeldParts:
        return self.owned.held_parts()

    def parameters(self) -> dict[str, Tensor]:
        return self.owned.parameters

    @contextmanager
    def evaluation_parameters(self) -> Iterator[None]:
        if self.communicator.size > 1:
            whole = {name: each.detach() for name, each in self._model.named_parameters()}
            self.owned.gather_into(whole, self.communicator)
        self._model.update_low_precision_weights()
        yield

    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        for name, values in parameters or ():
            self.owned.fill(name, values)

    def log_numbers(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": {"step": self._step, "trials": [], "ranks": self.communicator.size}}

    def load_state_dict(self, state: dict[str, Any], step: int, as_saved: bool) -> None:
        self._step = step

    def optimizer_state(self) -> dict[str, Tensor]:
        return self.owned.state

    def rank_state(self) -> RankState:
        return RankState()

    def restored(self, residual_factor: float) -> None:
        pass
