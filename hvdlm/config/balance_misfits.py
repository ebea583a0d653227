"""What `train.balance` does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdlm.config import Config


def balance_misfits(config: Config) -> dict[str, bool]:
    """Sentences, and whether they are true of the settings."""
    parallel, train = config.parallel, config.train
    if not train.balance:
        return {}
    return {
        "train.balance = true deals out steps in which all ranks wait for all: with local_steps.every leave it out, "
        "and set local_steps.by = 'seconds', by which a slow rank leaves out steps": bool(config.local_steps.every),
        "train.balance = true gives ranks unequal numbers of passes, which must be equal where ranks share a model: it "
        "goes with parallel.shard = 1 and parallel.pipeline, and neither with parallel.shard 2 or 3 nor with "
        "parallel.tensor": (parallel.shard > 1 or parallel.tensor > 1),
        "train.balance = true gives the stages of a pipeline blocks by the speeds of their ranks: leave out "
        "parallel.split": bool(parallel.split),
        "train.balance = true has the order of additions depend on measured times, and train.deterministic = true "
        "wants the same bits each time: leave out one of them": train.deterministic,
    }
