"""Ranks that gather without pause while all but one are killed, one after the other: `gathering.py SEED`.

Whatever a rank gathers is what all have sent; otherwise it says so, and ends with 3.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading

import torch

from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.mpi import MPICommunicator


def gather_until_one_dies(communicator: MPICommunicator) -> None:
    round_ = 0
    while True:
        round_ += 1
        own = torch.full((4,), 100 * round_ + communicator.rank)
        expected = 100 * round_ + torch.arange(communicator.size).repeat_interleave(4).view(-1, 4)
        if not torch.equal(gathered := communicator.all_gather(own), expected):
            print(f"rank {communicator.rank} of {communicator.size} has gathered {gathered.tolist()}", flush=True)
            os._exit(3)


def main() -> None:
    communicator = MPICommunicator(timeout=30)
    own, draw = communicator.rank, random.Random(int(sys.argv[1]))
    victims = draw.sample(range(communicator.size), communicator.size - 1)
    for victim in victims:
        seconds = 0.01 + 0.03 * draw.random()
        communicator.barrier()
        if own == victim:
            threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()
        try:
            gather_until_one_dies(communicator)
        except DeadRankError:
            communicator.regroup_()
    print("one rank is left", flush=True)
    communicator.close()


if __name__ == "__main__":
    main()
