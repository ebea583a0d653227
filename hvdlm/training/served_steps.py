"""Steps and rounds of servers whose workers do not wait for one another, as lines of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hvdlm.training.due import recurs
from hvdlm.training.hardware import peak_memory_bytes
from hvdlm.training.schedule import learning_rate

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def write_step(trainer: Trainer, step: Mapping[str, float], wire_bytes: int) -> None:
    """Writes a step, or the round that ends with it, if a line is due of it. `step`: what
    `strategies/server/ordering.py` names by `LINE`.
    """
    number, tokens = int(step["step"]), step["tokens"]
    config, round_steps = trainer.config, trainer.config.steps_of_served_round
    is_due = number == trainer.ending.last_step or recurs(number, config.log.every, round_steps)
    if trainer.metrics is None or not is_due:
        return
    loss = step["loss"] / tokens if tokens else math.nan
    steps = number - (number - 1) // round_steps * round_steps  # of the round
    counted = {"rounds": -(-number // round_steps)} if config.local_steps.every else {}
    trainer.metrics.write(
        "train",
        number,
        lr=learning_rate(number - 1, trainer.ending.last_step, config.optimizer),
        grad_norm=step["grad_norm"],
        tokens=config.tokens_before(number),
        loss=loss,
        mean_loss=loss,
        tokens_per_second=tokens / step["seconds"],
        step_seconds=step["seconds"] / steps,
        exposed_comm_seconds=0.0,
        wire_bytes=wire_bytes // steps,
        world_size=int(step["workers"]),
        memory_bytes=peak_memory_bytes(trainer.device),
        dropped=step["dropped"],
        staleness=step["staleness"],
        **counted,
    )
