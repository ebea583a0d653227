"""Steps of servers whose workers do not wait for one another, as lines of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hvdlm.training.due import recurs
from hvdlm.training.hardware import peak_memory_bytes

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def write_step(trainer: Trainer, step: Mapping[str, float], wire_bytes: int) -> None:
    """Writes a step, if a line is due of it. `step`: what `strategies/server/ordering.py` names by `LINE`."""
    number, tokens = int(step["step"]), step["tokens"]
    config = trainer.config
    if trainer.metrics is None or (number != trainer.ending.last_step and not recurs(number, config.log.every)):
        return
    loss = step["loss"] / tokens if tokens else math.nan
    trainer.metrics.write(
        "train",
        number,
        lr=step["lr"],
        grad_norm=step["grad_norm"],
        tokens=config.tokens_before(number),
        loss=loss,
        mean_loss=loss,
        tokens_per_second=tokens / step["seconds"],
        step_seconds=step["seconds"],
        exposed_comm_seconds=0.0,
        wire_bytes=wire_bytes,
        world_size=int(step["workers"]),
        memory_bytes=peak_memory_bytes(trainer.device),
        dropped=step["dropped"],
        staleness=step["staleness"],
    )
