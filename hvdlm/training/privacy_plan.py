"""`hvdlm privacy`, for the settings of a run."""

from __future__ import annotations

from pathlib import Path

from hvdlm.config import Config
from hvdlm.data.poisson import units_of
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.privacy.accountant import Accountant, check_delta
from hvdlm.privacy.plan import plans, print_plans


def plan(config: Config, epsilon: float, delta: float | None, units: int | None) -> None:
    """Prints what the run, with batches of several sizes, takes for a budget of `epsilon`.

    `delta`: None for that of the settings. `units`: sequences or documents; None: those of the run's data set.

    Raises HvdlmError if the data set cannot be read, or if no noise is enough.
    """
    privacy, batch = config.privacy, config.train.global_batch_size
    if units is None:
        units = units_of(DataSet(Path(config.data.path)).train, config.model.context_length, privacy.unit)
    if batch > units:
        raise HvdlmError(f"train.global_batch_size = {batch} is more than the {units:,} {privacy.unit}s: lower it")
    delta = privacy.delta if delta is None else delta
    check_delta("delta", delta, units, privacy.unit)
    steps = config.planned_steps
    print(
        f"epsilon {epsilon:g} at delta {delta:g}, by {privacy.accountant}: {steps:,} steps over {units:,} "
        f"{privacy.unit}s"
    )
    print_plans(plans(Accountant(privacy.accountant, delta), epsilon, units, batch, steps), privacy.unit)
