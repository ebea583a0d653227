"""`hvdlm privacy`: which noise a budget takes with batches of several sizes, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from hvdlm.privacy.accountant import Accountant, Phase

_DOUBLINGS = 4  # of the batch


class Plan(NamedTuple):
    """Batches of one size."""

    batch: int
    rate: float  # the chance of a unit to be in a batch
    passes: float  # how often each unit is in one, in the mean
    noise_multiplier: float
    noise: float  # standard deviation of the noise in the mean gradient, over the norm to which gradients are clipped
    epsilon: float


def plans(accountant: Accountant, epsilon: float, units: int, batch: int, steps: int) -> Iterator[Plan]:
    """Of batches of the given size, twice that, and so on, as far as the units go; all of as many steps.

    Raises HvdlmError if no noise is enough.
    """
    for size in [batch << doublings for doublings in range(_DOUBLINGS + 1) if batch << doublings <= units]:
        rate = size / units
        noise = accountant.noise_multiplier(epsilon, rate, steps)
        spent = accountant.epsilon([Phase(steps, noise, rate)])
        yield Plan(size, rate, steps * rate, noise, noise / size, spent)


def print_plans(rows: Iterator[Plan], unit: str) -> None:
    """As a table, on stdout."""
    table = Table(box=None)
    for head in (f"{unit}s a step", "rate", "passes", "noise multiplier", "noise / clip norm", "epsilon"):
        table.add_column(head, justify="right")
    for row in rows:
        numbers = f"{row.batch:,}", f"{row.rate:.3g}", f"{row.passes:.3g}", f"{row.noise_multiplier:.4g}"
        table.add_row(*numbers, f"{row.noise:.3g}", f"{row.epsilon:.4g}")
    Console(highlight=False).print(table)
