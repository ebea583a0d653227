"""Measures at start-up which all-reduce costs less, our ring or the engine's, for messages of several sizes.

A cost is elapsed time plus CPU time. Elapsed time counts when gradients are waited for; CPU time is taken from the
backward pass when they are not. MPI's own all-reduce spins: on a slow link it occupies the core as long as it lasts.
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
_ENGINE_MARGIN = 0.8  # the engine is chosen only below this share of the ring's cost: nearer, noise would decide
_LONGEST = 1.0  # seconds of cost after which a size and algorithm is not repeated, on a slow link


@dataclass(frozen=True)
class AlgorithmCost:
    """What an all-reduce of `elements` float32 numbers costs by each algorithm, in seconds, on the slowest rank."""

    elements: int
    ring: float
    engine: float


def probe_algorithms(communicator: Communicator, ring: Ring, largest: int) -> list[AlgorithmCost]:
    """Times both algorithms in turns for some sizes up to `largest` elements; equal on all ranks. Collective."""
    sizes = [largest]
    while sizes[0] // _GROWTH >= _SMALLEST:
        sizes.insert(0, sizes[0] // _GROWTH)
    costs = []
    for elements in sizes:
        values = torch.zeros(elements)
        algorithms: list[Callable[[Tensor], object]] = [ring.all_reduce_, communicator.all_reduce_]
        seconds: list[list[float]] = [[], []]
        for repetition in range(-1, _REPETITIONS):  # the first repetition warms up
            for all_reduce_, own_seconds in zip(algorithms, seconds, strict=True):
                if sum(own_seconds) > _LONGEST:
                    continue
                communicator.barrier()
                begin = _elapsed_and_cpu()
                all_reduce_(values)
                slowest = max(communicator.all_gather_object(_elapsed_and_cpu() - begin))
                if repetition >= 0 or slowest > _LONGEST:
                    own_seconds.append(slowest)
        costs.append(AlgorithmCost(elements, *map(statistics.median, seconds)))
    if communicator.rank == 0:
        summary = "; ".join(map(_summary, costs))
        logger.info("cost of an all-reduce, ring against engine %s: %s", communicator.engine, summary)
    return costs


def prefers_ring(costs: Sequence[AlgorithmCost], elements: int) -> bool:
    """Whether the ring is to sum `elements` numbers: unless the engine clearly costs less at the nearest size measured.

    Engines spin until a message arrives and the ring sleeps. While costs are measured all ranks are idle and none is
    late, so an engine takes more from a backward pass than was measured (benchmarks/LOG.md).
    """
    if not costs:
        return True
    nearest = min(costs, key=lambda cost: abs(math.log(cost.elements / elements)))
    return nearest.engine > _ENGINE_MARGIN * nearest.ring


def _elapsed_and_cpu() -> float:
    return time.perf_counter() + time.process_time()


def _summary(cost: AlgorithmCost) -> str:
    return f"{cost.elements * 4 / 2**10:,.0f} KiB {cost.ring * 1e3:.2f} against {cost.engine * 1e3:.2f} ms"
