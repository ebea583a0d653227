"""What Muon adds to a step of AdamW, with its matrices dealt out over the ranks and with all of them on each.

    mpirun -np 2 --bind-to none python benchmarks/muon_cost.py CONFIG

One job trains blocks of steps in turns, in changing order: AdamW, Muon as it is, and Muon of which each rank
orthogonalises every matrix. So what else the machine does falls on all of them. Prints the ratios of the seconds of a
step to those of AdamW's. Any setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from common.conditions import describe_run
from common.script import run_script
from common.steps import interval, parse_blocks, step_seconds
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.model.presets import PRESETS
from hvdlm.strategies.optimizer import deal_out_among
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.trainer import Trainer

_WARM_UP = 5  # steps
_REFERENCE = "AdamW"
_ALGORITHMS = ("adamw", "muon")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains the blocks."""
    fixed = ["--log.every", str(10**6), "--train.check_replicas_every", "0"]
    settings = [[*overrides, *fixed, "--optimizer.algorithm", name] for name in _ALGORITHMS]
    configs = [load(options.config, each, PRESETS) for each in settings]
    config = configs[0]
    keep_memory()
    with job(config.comm.engine, config.comm.timeout, config.digest()) as communicator, ExitStack() as stack:
        share_cores(config.train.threads, communicator)
        adamw, muon = (_trainer(each, communicator) for each in configs)
        loaders = {trainer: stack.enter_context(trainer.open_loader()) for trainer in (adamw, muon)}
        blocks = {_REFERENCE: (adamw, None), "Muon": (muon, communicator), "Muon, all on each rank": (muon, None)}
        ratios: dict[str, list[float]] = {name: [] for name in blocks}
        for trainer in (adamw, muon):
            step_seconds(trainer, loaders[trainer], _WARM_UP)
        for number in range(options.blocks):
            seconds = {}
            for name in list(blocks)[:: 1 if number % 2 else -1]:
                trainer, among = blocks[name]
                deal_out_among(trainer.optimizer, among)
                seconds[name] = max(
                    communicator.all_gather_object(step_seconds(trainer, loaders[trainer], options.steps))
                )
            for name, each in ratios.items():
                each.append(seconds[name] / seconds[_REFERENCE])
        if communicator.rank == 0:
            print(describe_run())
            for name in [each for each in blocks if each != _REFERENCE]:
                print(f"{name}: {interval(ratios[name])} of a step of {_REFERENCE}")


def _trainer(config: Config, communicator: Communicator) -> Trainer:
    data = DataSet(Path(config.data.path))
    device = choose_device(config.train.device, communicator)
    trainer = Trainer(config, communicator, data, config.model.vocab_size or data.vocab_size, device)
    trainer.start()
    return trainer


if __name__ == "__main__":
    run_script("muon_cost.py", lambda: run(*parse_blocks(__doc__, blocks=20)))
