"""What train.balance makes of two ranks of which one is slowed down, beside an even split.

    mpirun -np 2 --bind-to none python benchmarks/unequal_ranks.py CONFIG

The last rank is stopped and continued 50 times a second (SIGSTOP, SIGCONT), so that it runs for 1/2 and then for 1/4 of
the time. In turns, all ranks train blocks of steps: each for itself, which gives its own speed; with an even split; and
balanced. Prints, of the medians of rounds, tokens a second beside the sum of the ranks' own speeds and beside the
integer optimum, which is found by trying every split. Then, in how many steps after a change of speed shares are within
5% of that optimum. Any setting can be overridden as for `hvdlm train`, by --section.key value.

With --parallel.pipeline 2 the ranks are the stages of a pipeline, whose blocks are dealt out evenly or by speed. The
optimum is the best of all divisions of blocks, without the time in which stages wait for the first and the last
micro-batch.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import getpid
from pathlib import Path

from common.conditions import describe_run
from common.script import run_script
from common.steps import interval, parse_blocks
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import JobError
from hvdlm.model.presets import PRESETS
from hvdlm.parallel.pipeline.stages import flops
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.trainer import Trainer

_SPEEDS = (0.5, 0.25)
_SETTLING_STEPS = 40  # before the first block, in which shares come to rest
_MOST_STEPS = 60  # for which a change of shares is waited for
_NEAR = 1.05  # of the optimum's time

# Stops a process for a part of the time, until it is gone or SIGTERM comes; it is never left stopped
_DUTY_CYCLE = """
import os, signal, sys, time
victim, speed, period, ends = int(sys.argv[1]), float(sys.argv[2]), 0.02, []
signal.signal(signal.SIGTERM, lambda *_: ends.append(True))
while not ends and os.getppid() == victim:
    os.kill(victim, signal.SIGSTOP)
    time.sleep(period * (1 - speed))
    os.kill(victim, signal.SIGCONT)
    time.sleep(period * speed)
"""


@contextmanager
def running_at(speed: float, communicator: Communicator) -> Iterator[None]:
    """Within this context the last rank runs for so much of the time."""
    is_slow = communicator.rank == communicator.size - 1 and speed < 1
    command = [sys.executable, "-c", _DUTY_CYCLE, str(getpid()), str(speed)]
    duty_cycle = subprocess.Popen(command) if is_slow else None
    try:
        yield
    finally:
        if duty_cycle is not None:
            duty_cycle.terminate()
            duty_cycle.wait()


class System:
    """A way to train, with what reads its batches."""

    def __init__(self, config: Config, communicator: Communicator) -> None:
        data = DataSet(Path(config.data.path))
        device = choose_device(config.train.device, communicator)
        self.trainer = Trainer(config, communicator, data, config.model.vocab_size or data.vocab_size, device)
        self.trainer.start()
        self._loader = self.trainer.open_loader()

    def step(self) -> None:
        self.trainer.train_step(self._loader, stop_here=False)
        if self.trainer.balance:
            self._loader = self.trainer.balance.deal_out(self._loader)

    def tokens_per_second(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        return steps * self.trainer.nominal_tokens / (time.perf_counter() - begin)

    def close(self) -> None:
        self._loader.close()


def optimal_seconds(sequences: int, speeds: Sequence[float]) -> float:
    """Of a step whose sequences two ranks of these speeds, sequences a second, have divided as well as can be."""
    return min(max(own / speeds[0], (sequences - own) / speeds[1]) for own in range(sequences + 1))


def seconds_with(shares: Sequence[int], speeds: Sequence[float]) -> float:
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    fixed = ["--log.every", str(10**6), "--train.check_replicas_every", "0"]
    config = load(options.config, [*overrides, *fixed], PRESETS)
    batch, length = config.train.global_batch_size, config.model.context_length
    keep_memory()
    with job(config.comm.engine, config.comm.timeout, config.digest()) as communicator:
        if communicator.size != 2:
            raise JobError(f"two ranks are compared: start 2 instead of {communicator.size}")
        share_cores(config.train.threads, communicator)

        def say(sentence: object) -> None:
            if communicator.rank == 0:
                print(sentence, flush=True)

        say(describe_run())
        if config.parallel.pipeline > 1:
            run_pipeline(config, communicator, options, say)
            return
        balance = config.train.model_copy(update={"balance": True})
        half = config.train.model_copy(update={"global_batch_size": batch // 2})
        systems = {
            "own": System(config.model_copy(update={"train": half}), SoloCommunicator()),
            "even": System(config, communicator),
            "balanced": System(config.model_copy(update={"train": balance}), communicator),
        }
        balanced = systems["balanced"]
        for speed in _SPEEDS:
            rounds: list[dict[str, float]] = []
            with running_at(speed, communicator):
                for _ in range(_SETTLING_STEPS):
                    balanced.step()
                for number in range(options.blocks):
                    found = {}
                    for name in sorted(systems, reverse=bool(number % 2)):
                        communicator.barrier()
                        found[name] = communicator.all_gather_object(systems[name].tokens_per_second(options.steps))
                    speeds = [each / length for each in found["own"]]
                    optimum = batch * length / optimal_seconds(batch, speeds)
                    joint = {name: min(found[name]) for name in ("even", "balanced")}
                    rounds.append(
                        {**joint, "sum": sum(found["own"]), "optimum": optimum, "slow": speeds[1], "fast": speeds[0]}
                    )
            shares = balanced.trainer.parts.shares(balanced.trainer.step)
            say(f"the last rank runs for {speed:.0%} of the time; shares {shares}")
            for name, reference in (("balanced", "optimum"), ("balanced", "sum"), ("even", "sum"), ("slow", "fast")):
                say(f"  {name} / {reference}: {interval([each[name] / each[reference] for each in rounds])}")
            speeds = [statistics.median(each[name] for each in rounds) for name in ("fast", "slow")]
            for _ in range(_SETTLING_STEPS):
                balanced.step()
            before = balanced.trainer.parts.shares(balanced.trainer.step)
            with running_at(speed, communicator):
                steps = steps_until(balanced, lambda shares, known=tuple(speeds): is_near(shares, known))
            after = balanced.trainer.parts.shares(balanced.trainer.step)
            found = f"{steps} steps" if steps else f"not within {_MOST_STEPS} steps"
            say(f"  from {before} at full speed to {after}: {found}")
        for system in systems.values():
            system.close()


def run_pipeline(
    config: Config, communicator: Communicator, options: argparse.Namespace, say: Callable[[object], None]
) -> None:
    """Stages are dealt out when training begins, so all systems begin with each speed."""
    balance = config.train.model_copy(update={"balance": True})
    alone = config.parallel.model_copy(update={"pipeline": 1})
    for speed in _SPEEDS:
        with running_at(speed, communicator):
            systems = {
                "own": System(config.model_copy(update={"parallel": alone}), SoloCommunicator()),
                "even": System(config, communicator),
                "balanced": System(config.model_copy(update={"train": balance}), communicator),
            }
            rounds: list[dict[str, float]] = []
            for number in range(options.blocks + 1):
                found = {}
                for name in sorted(systems, reverse=bool(number % 2)):
                    communicator.barrier()
                    found[name] = communicator.all_gather_object(systems[name].tokens_per_second(options.steps))
                joint = {name: min(found[name]) for name in ("even", "balanced")}
                optimum = fastest_pipeline(config, systems["own"].trainer.model.output_weight.shape[0], found["own"])
                rounds.append({**joint, "sum": sum(found["own"]), "optimum": optimum})
        trainer = systems["balanced"].trainer
        say(f"the last rank runs for {speed:.0%} of the time; {trainer.sentences[0]}")
        for name, reference in (("balanced", "optimum"), ("balanced", "sum"), ("even", "sum")):
            say(f"  {name} / {reference}: {interval([each[name] / each[reference] for each in rounds[1:]])}")
        for system in systems.values():
            system.close()


def fastest_pipeline(config: Config, vocab_size: int, speeds: Sequence[float]) -> float:
    """Tokens a second of the best division of blocks. speeds: tokens a second of each rank with the whole model."""
    layers, costs = config.model.layers, flops(config.model, vocab_size)
    whole = layers * costs.block + costs.loss
    stages = [(own * costs.block, (layers - own) * costs.block + costs.loss) for own in range(layers + 1)]
    return max(min(speed * whole / max(cost, 1) for speed, cost in zip(speeds, each, strict=True)) for each in stages)


def is_near(shares: Sequence[int], speeds: Sequence[float]) -> bool:
    return seconds_with(shares, speeds) <= _NEAR * optimal_seconds(sum(shares), speeds)


def steps_until(system: System, is_reached: Callable[[Sequence[int]], bool]) -> int:
    """How many steps it takes; 0 if too many."""
    for step in range(1, _MOST_STEPS + 1):
        system.step()
        if is_reached(system.trainer.parts.shares(system.trainer.step)):
            return step
    return 0


if __name__ == "__main__":
    run_script("unequal_ranks.py", lambda: run(*parse_blocks(__doc__, blocks=10)))
