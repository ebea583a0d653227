"""Which all-reduce costs less here, our ring or the engine's? Tried at start-up, for messages of several sizes.

A cost is the time on the clock, which counts when gradients are waited for, plus the time on the core, which is taken
from the backward pass when they are not. MPI's own all-reduce spins: on a slow link it costs the core as long as it
lasts.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.ring import Ring

logger = logging.getLogger(__name__)

_SMALLEST = 4096  # elements
_GROWTH = 8  # from one size to the next
_REPETITIONS = 5
_CLEARLY = 0.8  # of the ring's cost: an engine's must be below, or chance decides
_PATIENCE = 1.0  # seconds of cost a size and algorithm may take, on a slow link


@dataclass(frozen=True)
class Trial:
    """What an all-reduce of so many float32 `elements` costs, in seconds, on the slowest rank."""

    elements: int
    ring: float
    engine: float


def try_algorithms(communicator: Communicator, ring: Ring, largest: int) -> list[Trial]:
    """Times both for a few sizes up to `largest` elements, in turns; equal on all ranks. Collective."""
    sizes = [largest]
    while sizes[0] // _GROWTH >= _SMALLEST:
        sizes.insert(0, sizes[0] // _GROWTH)
    trials = []
    for elements in sizes:
        values = torch.zeros(elements)
        ways: list[Callable[[Tensor], object]] = [ring.all_reduce_, communicator.all_reduce_]
        seconds: list[list[float]] = [[], []]
        for repetition in range(-1, _REPETITIONS):  # the first time warms up
            for way, taken in zip(ways, seconds, strict=True):
                if sum(taken) > _PATIENCE:
                    continue
                communicator.barrier()
                begin = _clock_and_core()
                way(values)
                slowest = max(communicator.all_gather_object(_clock_and_core() - begin))
                if repetition >= 0 or slowest > _PATIENCE:
                    taken.append(slowest)
        trials.append(Trial(elements, *map(statistics.median, seconds)))
    if communicator.rank == 0:
        told = "; ".join(map(_told, trials))
        logger.info("cost of an all-reduce, ring against engine %s: %s", communicator.engine, told)
    return trials


def prefers_ring(trials: Sequence[Trial], elements: int) -> bool:
    """Whether the engine did not cost clearly less at the size nearest to `elements`.

    Engines spin until a message has come, and the ring sleeps: in a trial all ranks are idle and none is late, so what
    an engine takes from backward passes is more than it shows (benchmarks/LOG.md).
    """
    if not trials:
        return True
    nearest = min(trials, key=lambda trial: abs(math.log(trial.elements / elements)))
    return nearest.engine > _CLEARLY * nearest.ring


def _clock_and_core() -> float:
    return time.perf_counter() + time.process_time()


def _told(trial: Trial) -> str:
    return f"{trial.elements * 4 / 2**10:,.0f} KiB {trial.ring * 1e3:.2f} against {trial.engine * 1e3:.2f} ms"
