"""What surviving costs while nothing happens: `comm.elastic` in every step, and a checkpoint that is written meanwhile.

    mpirun -np 2 --with-ft ulfm --bind-to none python benchmarks/elastic_cost.py CONFIG --comm.elastic true

One job trains blocks of steps in turns: without and with `comm.elastic`, and while a checkpoint is written. So what
else the machine does falls on all of them. Prints the ratios of the seconds of a step to those of a block without it,
and for how long a save stops training. Any setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from common.conditions import describe_run
from common.script import absolute_path, run_script
from hvdlm.config_reader import load
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet
from hvdlm.errors import JobError
from hvdlm.model.presets import PRESETS
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
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
            _seconds(trainer, loader, _WARM_UP)
            for number in range(options.blocks):
                trainer.elastic = None
                plain = _seconds(trainer, loader, options.steps)
                trainer.elastic = elastic
                ratios["elastic"].append(_seconds(trainer, loader, options.steps) / plain)
                if number % 2:
                    continue
                trainer.elastic = None
                begin = time.perf_counter()
                trainer.saver.save(in_background=True)
                stops.append((time.perf_counter() - begin) / plain)
                ratios["while a checkpoint is written"].append(_seconds(trainer, loader, options.steps) / plain)
                trainer.saver.wait(must_succeed=True)
        longest = communicator.all_gather_object(stops)  # a step waits for the rank that takes longest
        if communicator.rank == 0:
            print(describe_run())
            for name, values in ratios.items():
                print(f"{name}: {_interval(values)} of a step without")
            stopped = [max(each) for each in zip(*longest, strict=True)]
            print(f"a save stops training for {100 * statistics.median(stopped):.1f}% of a step, {len(stopped)} saves")


def _seconds(trainer: Trainer, loader: Loader, steps: int) -> float:
    """Of a step; the median of some."""
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        trainer.train_step(loader, stop_here=False)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _interval(ratios: Sequence[float]) -> str:
    """The median, and the mean with its 95% interval."""
    half = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return f"{statistics.median(ratios):.3f} (mean {statistics.fmean(ratios):.3f} ± {half:.3f}, {len(ratios)} pairs)"


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("--steps", type=int, default=8, help="of a block (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=20, help="of each kind (default: %(default)s)")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script("elastic_cost.py", lambda: run(*_parse()))
