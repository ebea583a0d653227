"""The process of one contestant of one_rank.py: builds it, trains steps when told, says what it measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from comparison.contestant import open_loader
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.training.hardware import choose_device, keep_memory, libraries_bytes, peak_memory_bytes
from hvdlm.training.peak import peak_flops
from hvdlm.training.trainer import Trainer
from solo.plain import PlainGPT, plain_step


@dataclass(frozen=True)
class Turn:
    """Mean seconds of a step; the device's rate just before; the most memory held since the start, in bytes."""

    step_seconds: float
    peak_flops: float | None
    memory_bytes: int


@dataclass(frozen=True)
class Start:
    """Memory of the process before the model was built, if it computes on the CPU; the loader's own rate."""

    base_bytes: int
    loader_tokens_per_second: float


def serve(pipe: Connection, config: Config, is_plain: bool) -> None:
    """Trains its first step, sends a `Start`, then answers numbers of steps with a `Turn` each, until 0."""
    if not is_plain:
        keep_memory()
    torch.set_num_threads(config.train.threads)
    data = DataSet(Path(config.data.path))
    device = choose_device(config.train.device, SoloCommunicator())
    vocab_size = config.model.vocab_size or data.vocab_size
    loader = open_loader(config, data, SoloCommunicator())
    base = libraries_bytes() if device.type == "cpu" else 0
    if is_plain:
        step = plain_step(PlainGPT(config, vocab_size).to(device), config, loader, device)
    else:
        trainer = Trainer(config, SoloCommunicator(), data, vocab_size, device)

        def step() -> object:
            return trainer.train_step(loader, stop_here=False)

    step()
    _wait_for(device)
    pipe.send("first step done")
    pipe.send(Start(base, _loader_rate(config, data)))
    while count := pipe.recv():
        peak = peak_flops(device, config.train.precision)
        step()  # memory that others have used comes back into the caches
        _wait_for(device)
        begin = time.perf_counter()
        for _ in range(count):
            step()
        _wait_for(device)
        seconds = (time.perf_counter() - begin) / count
        pipe.send(Turn(seconds, peak, peak_memory_bytes(device)))


def _loader_rate(config: Config, data: DataSet) -> float:
    """Tokens a second of batches that nobody trains on."""
    batches = 0
    with open_loader(config, data, SoloCommunicator()) as loader:
        loader.next()
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.5:
            loader.next()
            batches += 1
        seconds = time.perf_counter() - begin
    return batches * config.train.batch_size * config.model.context_length / seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
