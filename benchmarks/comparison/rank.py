"""One rank of a job of contestants: builds them, then takes turns as the race asks, until it hangs up.

Started by job.py, through a launcher: rank.py SOCKET CONFIG INTERFACE ENGINE CONTESTANT...
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Client
from pathlib import Path

# The packages of the benchmarks lie beside this one
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.utils import parameters_to_vector

from comparison.lineup import build
from comparison.turns import Request, digest, take_turn
from hvdlm.config import load
from hvdlm.data.shard import DataSet
from hvdlm.model.presets import PRESETS
from hvdlm.training.job import job


def main(address: str, config_path: str, interface: str, engine: str, *names: str) -> None:
    """`interface`: empty if there is none whose bytes are to be counted."""
    # Horovod's own default, which hvdlm changes for itself: Horovod's optimizer is to be as it comes
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(128 * 2**20))
    race = Client(address)
    config = load(Path(config_path), [], PRESETS)
    torch.set_num_threads(config.train.threads)
    with job(engine, config.comm.timeout, config.digest()) as communicator:
        data = DataSet(Path(config.data.path))
        contestants = {name: build(name, config, communicator, data) for name in names}
        race.send("ready")
        while True:
            try:
                request: Request = race.recv()
            except EOFError:
                break
            contestant = contestants[request.contestant]
            turn = take_turn(contestant, request.steps, interface or None)
            if request.parameters is not None and communicator.rank == 0:
                torch.save(parameters_to_vector(contestant.model.parameters()).detach(), request.parameters)
            race.send((turn, digest(contestant)))


if __name__ == "__main__":
    main(*sys.argv[1:])
