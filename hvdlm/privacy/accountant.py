"""What a run spends of its privacy budget: computed by Google's dp-accounting, of the extra `privacy`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from hvdlm.errors import HvdlmError, check_installed

if TYPE_CHECKING:
    from dp_accounting import DpEvent, PrivacyAccountant

AccountantName = Literal["rdp", "pld"]

_LEAST_NOISE, _MOST_NOISE = 0.25, 1e4  # noise multipliers beyond are not looked for
_PRECISION = 1e-3  # of a noise multiplier that is


class Phase(NamedTuple):
    """Steps of one kind, that follow one another."""

    steps: int
    noise_multiplier: float
    """Standard deviation of the noise in a sum of gradients, over the norm to which each of these is clipped."""
    rate: float
    """The chance of a unit to be in a batch, each on its own (Poisson sampling)."""


class Accountant:
    """Of neighbours that differ in one unit, which one of them has and the other has not."""

    def __init__(self, name: AccountantName, delta: float) -> None:
        """`name`: "rdp", of Renyi divergences (Mironov et al., arXiv:1908.10530), by the orders of dp-accounting; or
        "pld", which composes distributions of the privacy loss numerically (Doroshenko et al., arXiv:2207.04380), and
        is tighter.

        Raises HvdlmError if dp-accounting is not installed.
        """
        check_installed("dp_accounting", "[privacy]", "dp-accounting", "privacy")
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of orders that it does without
        self._name, self._delta = name, delta

    def epsilon(self, phases: Sequence[Phase]) -> float:
        """Of all steps together; infinite if some are without noise."""
        return _epsilon(self._name, self._delta, tuple(phases))

    def noise_multiplier(self, epsilon: float, rate: float, steps: int) -> float:
        """The least for so many steps, to within a thousandth; 0.25 if that or less is enough.

        Raises HvdlmError if none is enough.
        """
        if self.epsilon([Phase(steps, _MOST_NOISE, rate)]) > epsilon:
            raise HvdlmError(
                f"no noise brings {steps:,} steps with a sampling rate of {rate:.3g} to epsilon = {epsilon:g} at delta "
                f"= {self._delta:g}: raise epsilon or delta"
            )
        low, high = 0.5, 1.0
        while self.epsilon([Phase(steps, high, rate)]) > epsilon:
            low, high = high, 2 * high
        while self.epsilon([Phase(steps, low, rate)]) <= epsilon:
            low, high = low / 2, low
            if high <= _LEAST_NOISE:
                return high
        from dp_accounting import ExplicitBracketInterval, SelfComposedDpEvent, calibrate_dp_mechanism

        return float(
            calibrate_dp_mechanism(
                partial(_make, self._name),
                lambda noise: SelfComposedDpEvent(_event(Phase(steps, noise, rate)), steps),
                epsilon,
                self._delta,
                ExplicitBracketInterval(low, high),
                tol=_PRECISION * min(high, 1.0),
            )
        )

    def steps_within(self, epsilon: float, before: Sequence[Phase], phase: Phase) -> int:
        """How many of the steps of `phase` may follow those of phases before, so that all spend at most `epsilon`."""
        if self.epsilon([*before, phase]) <= epsilon:
            return phase.steps
        most, too_many = 0, phase.steps
        while too_many - most > 1:
            middle = (most + too_many) // 2
            if self.epsilon([*before, phase._replace(steps=middle)]) <= epsilon:
                most = middle
            else:
                too_many = middle
        return most


@lru_cache(maxsize=1)  # half a second by pld: a line of the log and a checkpoint ask for that of one step
def _epsilon(name: AccountantName, delta: float, phases: tuple[Phase, ...]) -> float:
    accountant = _make(name)
    for phase in phases:
        if phase.steps:
            accountant.compose(_event(phase), phase.steps)
    return float(accountant.get_epsilon(delta))


def _make(name: AccountantName) -> PrivacyAccountant:
    if name == "rdp":
        from dp_accounting.rdp import RdpAccountant

        return RdpAccountant()
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(value_discretization_interval=1e-3)


def check_delta(name: str, delta: float, units: int, unit: str) -> None:
    """Raises HvdlmError, which calls delta `name`, if one of the units might be published for certain."""
    if delta * units >= 1:
        raise HvdlmError(
            f"{name} = {delta:g} would allow for one of the {units:,} {unit}s to be published: set it below "
            f"{1 / units:.1g}"
        )


def _event(phase: Phase) -> DpEvent:
    """One step."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    noised = GaussianDpEvent(phase.noise_multiplier)
    return noised if phase.rate >= 1 else PoissonSampledDpEvent(phase.rate, noised)
