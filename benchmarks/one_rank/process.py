"""The process that trains one system alone, seen from inside (`serve`) and from one_rank.py (`SystemProcess`)."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common.batches import open_loader
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.training.hardware import choose_device, keep_memory, libraries_bytes, peak_memory_bytes
from hvdlm.training.peak import peak_flops
from hvdlm.training.trainer import Trainer
from one_rank.plain_gpt import PlainGPT, plain_step

_REPLY_SECONDS = 600.0  # for a step, compilation included
_END_SECONDS = 30.0
_LOADER_SECONDS = 0.5  # over which the loader alone is measured


@dataclass(frozen=True)
class StepTime:
    """A system in one round."""

    step_seconds: float  # mean over the steps
    peak_flops: float | None  # FLOP/s of matrix products on the device just before; None: not known
    memory_bytes: int  # the most that was held since the process started


@dataclass(frozen=True)
class Start:
    """What is measured once, after the first step."""

    base_bytes: int  # memory of the process before the model was built; 0 on a GPU
    loader_tokens_per_second: float  # of batches that nobody trains on


class SystemProcess:
    """A system's process, which has trained its first step."""

    def __init__(self, name: str, config: Config, is_plain: bool) -> None:
        """Raises HvdlmError if the process ends or does not reply."""
        begin = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=serve, args=(other_end, config, is_plain), daemon=True)
        self._process.start()
        other_end.close()
        self._receive()
        self.first_step_seconds = time.perf_counter() - begin  # from the start of the process, imports included
        self.start: Start = self._receive()

    def measure(self, steps: int) -> StepTime:
        """Trains one step that is not measured, then `steps` that are."""
        self._pipe.send(steps)
        step_time: StepTime = self._receive()
        return step_time

    def end(self) -> None:
        """Ends the process, at the latest after half a minute."""
        if self._process.is_alive():
            self._pipe.send(0)
            self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            if self._pipe.poll(_REPLY_SECONDS):
                return self._pipe.recv()
        except EOFError:
            raise HvdlmError(f"the process of {self._name} has ended: see its message above") from None
        raise HvdlmError(f"the process of {self._name} has not replied within {_REPLY_SECONDS:g} s")


def serve(pipe: Connection, config: Config, is_plain: bool) -> None:
    """Trains the first step, reports it and sends a `Start`, then measures the numbers of steps that it receives.

    The reply to each number is a `StepTime`; 0 ends the process.
    """
    if not is_plain:
        keep_memory()
    torch.set_num_threads(config.train.threads)
    data = DataSet(Path(config.data.path))
    device = choose_device(config.train.device, SoloCommunicator())
    vocab_size = config.model.vocab_size or data.vocab_size
    loader = open_loader(config, data, SoloCommunicator())
    base = libraries_bytes(has_compiler=True) if device.type == "cpu" else 0
    if is_plain:
        step = plain_step(PlainGPT(config, vocab_size).to(device), config, loader, device)
    else:
        trainer = Trainer(config, SoloCommunicator(), data, vocab_size, device)

        def step() -> object:
            return trainer.train_step(loader, stop_here=False)

    step()
    _synchronize(device)
    pipe.send("first step done")
    pipe.send(Start(base, _loader_rate(config, data)))
    while count := pipe.recv():
        peak = peak_flops(device, config.train.precision)
        step()  # fills the caches, which other processes have used meanwhile
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            step()
        _synchronize(device)
        seconds = (time.perf_counter() - begin) / count
        pipe.send(StepTime(seconds, peak, peak_memory_bytes(device)))


def _loader_rate(config: Config, data: DataSet) -> float:
    """Tokens per second of batches that nobody trains on."""
    batches = 0
    with open_loader(config, data, SoloCommunicator()) as loader:
        loader.next()
        begin = time.perf_counter()
        while time.perf_counter() - begin < _LOADER_SECONDS:
            loader.next()
            batches += 1
        seconds = time.perf_counter() - begin
    return batches * config.train.global_batch_size * config.model.context_length / seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
