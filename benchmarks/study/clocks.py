"""How far each rank's clock is from rank 0's, with a bound on the error, by any engine."""

from __future__ import annotations

import time

import torch

from hvdlm.comm.communicator import Communicator

_ROUNDS = 50


def offsets(communicator: Communicator) -> tuple[list[float], float]:
    """Seconds to subtract from each rank's time.perf_counter() for rank 0's, and the largest possible error.

    In each round all ranks gather the times at which they began it. What rank r has sent cannot have come before it
    was sent, and the other way round: with offset o, begin_0 + o <= end_r and begin_r - o <= end_0. Many rounds leave a
    narrow interval (Cristian, "Probabilistic clock synchronization", Distributed Computing 3, 1989), whose middle
    it is. Collective.
    """
    high = float("inf")
    lows = [-float("inf")] * communicator.size
    for _ in range(_ROUNDS):
        communicator.barrier()
        begin = time.perf_counter()
        begins = communicator.all_gather(torch.tensor([begin], dtype=torch.float64).view(torch.uint8))
        end = time.perf_counter()
        times = [float(each) for each in begins.view(torch.float64).flatten()]
        high = min(high, end - times[0])
        # What rank 0 knows of the others: rank r had begun when rank 0 had its message
        lows = [max(before, at - end) for before, at in zip(lows, times, strict=True)]
    of_all = communicator.all_gather_object((high, lows))
    bounds = [(of_all[0][1][rank], of_all[rank][0]) for rank in range(communicator.size)]
    bounds[0] = (0.0, 0.0)
    return [(least + most) / 2 for least, most in bounds], max((most - least) / 2 for least, most in bounds)
