"""How long the ranks of a pipeline wait in a step, by schedule, beside what the papers' formulas say.

    mpirun -np 2 --bind-to none python benchmarks/pipeline_bubble.py
    mpirun -np 4 --bind-to none python benchmarks/pipeline_bubble.py --schedules 1f1b zero_bubble --model.layers 16

All ranks are stages of one pipeline, of a model whose vocabulary is so small that its loss costs little, so that stages
cost the same; tokens are random. Steps of all schedules are made in turns. The bubble is the share of the time of all
ranks, from a barrier to the end of the last rank's passes, in which they compute nothing. Any setting can be overridden
as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from common.conditions import describe_run
from common.script import run_script
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mesh import Mesh, mesh_shape
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.model.loss import token_loss
from hvdlm.model.presets import PRESETS
from hvdlm.parallel.pipeline.executor import MicroBatch, Pipeline
from hvdlm.parallel.pipeline.schedules import make_schedule
from hvdlm.parallel.pipeline.simulation import PassSeconds, simulate
from hvdlm.parallel.pipeline.stage_model import StageModel
from hvdlm.timing import StepTimer
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.model import make_model

_SETTINGS = {
    "model.layers": 8,
    "model.heads": 4,
    "model.width": 256,
    "model.context_length": 256,
    "model.vocab_size": 256,
    "train.micro_batch_size": 2,
}
_SCHEDULES = ["gpipe", "1f1b", "eager_1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"]
_WARM_UP = 2  # steps


class _Measured:
    """One schedule, and what was measured of it."""

    def __init__(self, config: Config, communicator: Communicator, device: torch.device) -> None:
        """Collective."""
        self.config, self._communicator, self._device = config, communicator, device
        mesh = Mesh(communicator, mesh_shape(config.parallel, communicator.size))
        model = make_model(config, config.model.vocab_size, device, mesh)
        assert isinstance(model, StageModel)
        self._model, self._pipeline = model, Pipeline(model, mesh["pipeline"], config.parallel, communicator.activity)
        self.bubbles: list[float] = []
        self.seconds: list[float] = []

    def step(self, micro_batches: Sequence[MicroBatch], counts: bool) -> None:
        """The passes of one step, on all ranks."""
        model, communicator = self._model, self._communicator

        def loss(hidden: Tensor, targets: Tensor) -> Tensor:
            return token_loss(hidden, model.output_weight, targets, model.dtype)

        model.zero_grad()
        communicator.barrier()
        begin, timer = time.perf_counter(), StepTimer(self._device)
        self._pipeline.train(micro_batches, loss, 1.0, timer)
        phases = timer.seconds()
        own = (time.perf_counter() - begin, phases["forward"] + phases["backward"])
        elapsed, busy = zip(*communicator.all_gather_object(own), strict=True)
        if counts:
            self.seconds.append(max(elapsed))
            self.bubbles.append(1 - sum(busy) / (len(busy) * max(elapsed)))

    def report(self, micro_batches: int) -> str:
        """One line."""
        parallel = self.config.parallel
        chunks = parallel.stages // parallel.pipeline
        schedule = make_schedule(parallel.schedule, parallel.pipeline, micro_batches, chunks)
        formula = simulate(schedule, PassSeconds(1, 1, 1), chunks).bubble
        low, high = min(self.bubbles), max(self.bubbles)
        return (
            f"{parallel.schedule:12}  bubble {statistics.median(self.bubbles):6.1%} ({low:.1%} to {high:.1%})  "
            f"formula {formula:6.1%}  step {statistics.median(self.seconds):.3f} s"
        )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures, and prints the medians."""
    keep_memory()
    settings = [word for name, value in _SETTINGS.items() for word in (f"--{name}", str(value))]
    with job("auto", 300, " ".join(overrides)) as communicator:
        pipeline = ["--parallel.pipeline", str(communicator.size)]
        configs = [
            load(None, [*settings, *pipeline, "--parallel.schedule", name, *overrides], PRESETS)
            for name in options.schedules
        ]
        device = choose_device(configs[0].train.device, communicator)
        share_cores(configs[0].train.threads, communicator)
        measured = [_Measured(config, communicator, device) for config in configs]
        generator = torch.Generator().manual_seed(0)
        model, train = configs[0].model, configs[0].train
        shape = (train.micro_batch_size, model.context_length)
        tokens = [
            torch.randint(model.vocab_size, shape, generator=generator).to(device) for _ in range(options.micro_batches)
        ]
        micro_batches = [MicroBatch(each, each.roll(-1, dims=1)) for each in tokens]
        for number in range(_WARM_UP + options.steps):
            for each in measured:
                each.step(micro_batches, counts=number >= _WARM_UP)
        if communicator.rank == 0:
            print(describe_run())
            stages = f"{communicator.size} stages, {options.micro_batches} micro-batches, {train.precision}"
            print(f"{stages}; medians of {options.steps} steps, least and most; formula with equal F, B and W:")
            for each in measured:
                print(each.report(options.micro_batches))


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=_SCHEDULES, choices=_SCHEDULES, help="default: all")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each schedule (default: %(default)s)")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script("pipeline_bubble.py", lambda: run(*_parse()))
