"""What a codec costs here: tried on a bucket's worth of numbers, by all ranks at once, with nothing else to do."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.forecast import Cost
from hvdlm.gradients.moment import Moment

_REPETITIONS = 5
_PATIENCE = 0.5  # seconds that the repetitions may take together, on a slow link

_SPIN = 0.02  # seconds of computing by which it is seen whether threads take turns


def try_codec(communicator: Communicator, buffer: Tensor, reduce: Callable[[Tensor], float]) -> Cost:
    """The median of a few repetitions, of the slowest rank; equal on all ranks. Collective.

    `buffer`: like whose numbers the ones reduced are, not changed. `reduce`: does it, and returns the seconds of it
    that were spent on computing.
    """
    # A generator of its own: what the training draws does not depend on how often this is done
    generator = torch.Generator(buffer.device).manual_seed(communicator.rank)
    gradients = torch.randn(buffer.shape, generator=generator, device=buffer.device)
    values = torch.empty_like(gradients)
    costs: list[Cost] = []
    for repetition in range(-1, _REPETITIONS):  # the first time warms up
        if sum(map(sum, costs)) > _PATIENCE:
            break
        values.copy_(gradients)
        communicator.barrier()
        begin = Moment(buffer.device)
        computing = reduce(values)
        seconds = Moment(buffer.device) - begin
        everyone = communicator.all_gather_object((computing, seconds))
        slowest = max(each[1] for each in everyone)
        computing = min(slowest, max(each[0] for each in everyone))
        if repetition >= 0 or slowest > _PATIENCE:
            costs.append(Cost(computing, slowest - computing))
    return Cost(*(statistics.median(parts) for parts in zip(*costs, strict=True)))


def threads_take_turns(communicator: Communicator) -> bool:
    """Whether a second thread of some rank slows down its first: it has no core of its own. Collective."""
    values = torch.ones(4096)

    def spin() -> int:
        count, end = 0, time.perf_counter() + _SPIN
        while time.perf_counter() < end:
            for _ in range(50):
                values.mul_(1.0)
            count += 1
        return count

    def beside_another() -> int:
        other = threading.Thread(target=spin)
        other.start()
        count = spin()
        other.join()
        return count

    communicator.barrier()
    alone = spin()
    communicator.barrier()
    return any(communicator.all_gather_object(beside_another() < 0.7 * alone))
