"""One rank of a job of systems: builds them, then measures one after the other as compare.py asks.

Started by job.py under a launcher: compare_worker.py SOCKET CONFIG INTERFACE ENGINE SYSTEM...
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Client
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

import torch
from torch.nn.utils import parameters_to_vector

from compare.measurement import Request, measure
from compare.registry import build, is_hvdlm, sums_by_engine
from hvdlm.comm.replicas import parameter_hash
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.model.presets import PRESETS
from hvdlm.training.job import job


def main(address: str, config_path: str, interface: str, engine: str, *names: str) -> None:
    """`interface`: the network interface whose bytes are counted; empty: none."""
    if not all(is_hvdlm(name) for name in names):
        # The default of Horovod, which hvdlm would change: Horovod's optimizer is measured with its own defaults
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(128 * 2**20))
    connection = Client(address)
    config = load(Path(config_path), [], PRESETS)
    torch.set_num_threads(config.train.threads)
    engine_sums = any(sums_by_engine(name, config) for name in names)
    with job(engine, config.comm.timeout, config.digest(), engine_sums=engine_sums) as communicator:
        data = DataSet(Path(config.data.path))
        systems = {name: build(name, config, communicator, data) for name in names}
        connection.send("ready")
        while True:
            try:
                request: Request = connection.recv()
            except EOFError:
                break
            system = systems[request.system]
            measurement = measure(system, request.steps, interface or None)
            parameters = system.parameters()  # which all ranks may have to make together
            if request.parameters is not None and communicator.rank == 0:
                torch.save(parameters_to_vector(parameters.values()).detach(), request.parameters)
            connection.send((measurement, parameter_hash(parameters)))


if __name__ == "__main__":
    main(*sys.argv[1:])
