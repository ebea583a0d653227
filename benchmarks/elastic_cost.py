"""What surviving costs while nothing happens: `comm.elastic` in every step, and a checkpoint that is written meanwhile.

    mpirun -np 2 --with-ft ulfm --bind-to none python benchmarks/elastic_cost.py CONFIG --comm.elastic true

One job trains blocks of steps in turns: without and with `comm.elastic`, in changing order, and while a checkpoint is
written. So what else the machine does falls on all of them. Prints the ratios of the seconds of a step to those of a
block without it, and for how long a save stops training: until it returns, and where an update waits for its copy. Any
setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.conditions import describe_run
from common.script import run_script
from common.steps import interval, parse_blocks, step_seconds
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import JobError
from hvdlm.model.presets import PRESETS
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.saver import Saver
from hvdlm.training.trainer import Trainer

_WARM_UP = 10  # steps


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains the blocks. Raises JobError if the job is not elastic."""
    config = load(options.config, [*overrides, "--log.every", str(10**6)], PRESETS)
    keep_memory()
    with job(config.comm.engine, config.comm.timeout, config.digest(), config.comm.elastic) as communicator:
        device = choose_device(config.train.device, communicator)
        share_cores(config.train.threads, communicator)
        data = DataSet(Path(config.data.path))
        trainer = Trainer(config, communicator, data, config.model.vocab_size or data.vocab_size, device)
        elastic = trainer.elastic
        if elastic is None:
            raise JobError("elastic_cost.py measures comm.elastic = true on two or more ranks")
        trainer.tokenizer = data.tokenizer_path.read_bytes()
        trainer.start()
        ratios: dict[str, list[float]] = {"elastic": [], "while a checkpoint is written": []}
        stops: list[float] = []
        with trainer.open_loader() as loader:
            step_seconds(trainer, loader, _WARM_UP)
            for number in range(options.blocks):
                seconds: dict[bool, float] = {}
                for is_elastic in (False, True) if number % 2 else (True, False):
                    trainer.elastic = elastic if is_elastic else None
                    seconds[is_elastic] = step_seconds(trainer, loader, options.steps)
                ratios["elastic"].append(seconds[True] / seconds[False])
                if number % 2:
                    continue
                trainer.elastic = None
                with _Stopped(trainer.saver) as stopped:
                    trainer.saver.save(in_background=True)
                    written = step_seconds(trainer, loader, options.steps)
                stops.append(stopped.seconds / seconds[False])
                ratios["while a checkpoint is written"].append(written / seconds[False])
                trainer.saver.wait(must_succeed=True)
        longest = communicator.all_gather_object(stops)  # a step waits for the rank that takes longest
        if communicator.rank == 0:
            print(describe_run())
            for name, values in ratios.items():
                print(f"{name}: {interval(values)} of a step without")
            slowest = [max(each) for each in zip(*longest, strict=True)]
            print(f"a save stops training for {100 * statistics.median(slowest):.1f}% of a step, {len(slowest)} saves")


class _Stopped:
    """For how many seconds training waits for a saver."""

    def __init__(self, saver: Saver) -> None:
        self._saver, self._original = saver, (saver.save, saver.have_copied)
        self.seconds = 0.0

    def __enter__(self) -> _Stopped:
        for method in self._original:
            setattr(self._saver, method.__name__, self._timed(method))
        return self

    def __exit__(self, *_: object) -> None:
        for method in self._original:
            delattr(self._saver, method.__name__)

    def _timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            begin = time.perf_counter()
            method(*arguments, **options)
            self.seconds += time.perf_counter() - begin

        return run


if __name__ == "__main__":
    run_script("elastic_cost.py", lambda: run(*parse_blocks(__doc__, blocks=100)))
