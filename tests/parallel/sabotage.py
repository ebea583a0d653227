"""`hvdlm train` with something wrong on one rank: `sabotage.py KIND RANK ARGUMENTS...`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import hvdlm
from hvdlm.cli import main
from hvdlm.errors import JobError
from hvdlm.training.trainer import Trainer


def own_rank() -> int:
    return int(os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))


def other_version() -> None:
    hvdlm.__version__ = "0.0.1"


def diverging_parameter() -> None:
    update = Trainer._update

    def update_wrongly(self: Trainer, rate: float) -> None:
        update(self, rate)
        if self.step == 12:
            with torch.no_grad():
                self.model.final_norm.weight[0] += 1e-6

    Trainer._update = update_wrongly  # type: ignore[method-assign]


def own_error() -> None:
    """An error that all ranks raise at one place, raised by one."""

    def update_never(self: Trainer, rate: float) -> None:
        raise JobError("the gradient norm is nan at step 1: lower optimizer.lr")

    Trainer._update = update_never  # type: ignore[method-assign]


def bug() -> None:
    def update_never(self: Trainer, rate: float) -> None:
        raise ZeroDivisionError("a bug for the test")

    Trainer._update = update_never  # type: ignore[method-assign]


def stopped() -> None:
    """Stops, as a debugger or a suspended machine would, in the middle of a backward pass."""
    forward = Trainer.micro_batch_loss

    def stopping_forward(self: Trainer, *arguments: Any) -> Tensor:
        if self.step == 12:
            self.model.final_norm.weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGSTOP))
        return forward(self, *arguments)

    Trainer.micro_batch_loss = stopping_forward  # type: ignore[method-assign]


def flipped_bit() -> None:
    """In one moment, and the parameter that it belongs to goes its own way from then on."""
    update = Trainer._update

    def update_wrongly(self: Trainer, rate: float) -> None:
        update(self, rate)
        if self.step == 12:
            moment = self.strategy.optimizer_state()["exp_avg.final_norm.weight"]
            moment.view(torch.int32)[0] ^= 1 << 22

    Trainer._update = update_wrongly  # type: ignore[method-assign]


def stuck() -> None:
    """In the middle of a forward pass, in a way that other threads of the process go on."""
    forward = Trainer.micro_batch_loss

    def endless_forward(self: Trainer, *arguments: Any) -> Tensor:
        if self.step == 12:
            time.sleep(1000)
        return forward(self, *arguments)

    Trainer.micro_batch_loss = endless_forward  # type: ignore[method-assign]


def stuck_file_system() -> None:
    """The first checkpoint never gets written."""

    def save_for_ever(*_: object, **__: object) -> None:
        time.sleep(1000)

    safetensors.torch.save_file = save_for_ever


def slow() -> None:
    forward = Trainer.micro_batch_loss

    def slow_forward(self: Trainer, *arguments: Any) -> Tensor:
        time.sleep(0.2)
        return forward(self, *arguments)

    Trainer.micro_batch_loss = slow_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, *arguments = sys.argv[1:]
    if own_rank() == int(rank):
        globals()[kind]()
    sys.exit(main(arguments))
