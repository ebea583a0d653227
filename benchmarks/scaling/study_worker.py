"""One rank of a study's job: measures one codec after the other; rank 0 writes the results of all ranks.

Started by repetitions.py under a launcher: study_worker.py TASK, a JSON file that repetitions.py has written.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

import psutil
import torch

from common.conditions import describe_machine, describe_versions
from common.results import write_results
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.replicas import parameter_hash
from hvdlm.config import Config
from hvdlm.config_reader import from_dict
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet
from hvdlm.gradients.auto.switchable import SwitchableCodec
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.model.presets import PRESETS
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.training.hardware import choose_device, keep_memory, seconds_alive, share_cores
from hvdlm.training.job import job
from hvdlm.training.trainer import Trainer
from scaling.simulated_compute import SimulatedTrainer

# The steps in which codec auto measures, tries five choices, and has checked its choice once.
_AUTO_WARMUP = 40

_VARIABLES = ("OMPI_MCA_", "HOROVOD_", "OMP_", "NCCL_", "GLOO_", "UCX_", "CUDA_VISIBLE_")


def main(task_file: str) -> None:
    task = json.loads(Path(task_file).read_text(encoding="utf-8"))
    configs = {codec: from_dict(settings, task_file, PRESETS) for codec, settings in task["configs"].items()}
    first = next(iter(configs.values()))
    logging.basicConfig(format="hvdlm: %(message)s")
    logging.getLogger("hvdlm").setLevel(logging.INFO)  # so that the job's log has the choices of codec auto
    keep_memory()
    digest = hashlib.sha256(Path(task_file).read_bytes()).hexdigest()
    with job(first.comm.engine, first.comm.timeout, digest) as communicator:
        device = choose_device(first.train.device, communicator)
        share_cores(first.train.threads, communicator)
        data = DataSet(Path(first.data.path))
        codecs = {
            codec: _measure_codec(task, task["steps"][codec], config, communicator, data, device)
            for codec, config in configs.items()
        }
        if communicator.rank == 0:
            result = {
                "hosts": communicator.hosts,
                "engine": communicator.engine,
                "vocab_size": first.model.vocab_size or data.vocab_size,
                "machine": describe_machine(),
                "versions": describe_versions("scipy", "numba"),
                "environment": _environment(),
                "codecs": codecs,
            }
            write_results(Path(task["output"]), result)


def _measure_codec(
    task: dict[str, Any],
    steps: int,
    config: Config,
    communicator: Communicator,
    data: DataSet,
    device: torch.device,
) -> dict[str, Any]:
    """Trains with one codec; returns its buckets and one repetition of its point, the same on all ranks.

    `steps`: that are measured.
    """
    vocab_size = config.model.vocab_size or data.vocab_size
    simulated = task["simulated_tokens_per_second"]
    trainer = (SimulatedTrainer if simulated else Trainer)(config, communicator, data, vocab_size, device)
    if isinstance(trainer, SimulatedTrainer):
        trainer.prepare(simulated)
    trainer.start()
    loader = trainer.open_loader()
    trainer.train_step(loader, stop_here=False)
    start_seconds = seconds_alive()
    warmup = max(task["warmup_steps"], _AUTO_WARMUP if config.compression.codec == AUTO else 0)
    warmup = max(warmup, int(config.local_steps.every) + config.local_steps.overlap)  # until rounds end as they begin
    for _ in range(warmup - 1):
        trainer.train_step(loader, stop_here=False)
    own = _measure_steps(trainer, loader, communicator, steps, task["ranks_per_machine"])
    channels = len(trainer.strategy.channels)
    trainer.strategy.finish()  # with local steps ranks are equal after that
    ranks = communicator.all_gather_object({**own, "start": start_seconds, "hash": parameter_hash(trainer.parameters)})
    measured = {
        "channels": channels,
        "buckets": _describe_buckets(trainer),
        "repetition": {
            "step_seconds": [rank["steps"] for rank in ranks],
            "seconds": max(rank["seconds"] for rank in ranks) / steps,
            "phase_seconds": [rank["phases"] for rank in ranks],
            **{
                name: statistics.fmean(rank[name] for rank in ranks)
                for name in ("codec_seconds", "exchange_seconds", "core_seconds", "wire_bytes")
            },
            "start_seconds": max(rank["start"] for rank in ranks),
            "parameter_hashes": [rank["hash"] for rank in ranks],
        },
    }
    loader.close()
    del trainer, loader
    gc.collect()
    return measured


def _describe_buckets(trainer: Trainer) -> list[dict[str, Any]]:
    """Those that travel: of gradients, or of the differences of local steps."""
    strategy, chosen = trainer.strategy, trainer.config.compression.codec
    pairs: list[tuple[Bucket, Codec]] = list(zip(strategy.sync.buckets, strategy.sync.codecs, strict=True))
    if isinstance(strategy, LocalSteps):
        pairs = [pair for each in strategy.fragments for pair in zip(each.buckets, each.codecs, strict=True)]
    return [
        {
            "shapes": [list(parameter.shape) for parameter in bucket.parameters],
            "codec": codec.name if isinstance(codec, SwitchableCodec) else chosen,
        }
        for bucket, codec in pairs
    ]


def _measure_steps(
    trainer: Trainer, loader: Loader, communicator: Communicator, steps: int, ranks_per_machine: int
) -> dict[str, Any]:
    """This rank's measurements of some steps, which all ranks begin together."""
    step_seconds, phases, traffic = [], [], []
    exchange = 0.0
    communicator.barrier()
    core_begin, begin = _busy_seconds(), time.perf_counter()
    before = begin
    for _ in range(steps):
        trainer.train_step(loader, stop_here=False)
        now = time.perf_counter()
        step_seconds.append(now - before)
        before = now
        phases.append(trainer.timer.seconds())
        traffic.append(trainer.strategy.traffic)
        exchange += sum(channel.exchange.seconds for channel in trainer.strategy.channels)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    communicator.barrier()
    core = (_busy_seconds() - core_begin) / ranks_per_machine
    return {
        "steps": step_seconds,
        "seconds": seconds,
        "phases": {name: statistics.fmean(each.get(name, 0.0) for each in phases) for name in phases[0]},
        "codec_seconds": statistics.fmean(each.codec_seconds for each in traffic),
        "exchange_seconds": exchange / steps,
        "core_seconds": core / steps,
        "wire_bytes": statistics.fmean(each.wire_bytes for each in traffic),
    }


def _busy_seconds() -> float:
    """Seconds for which cores of this machine were busy, with any process: the kernel's work for the network is not
    counted to the process that sends."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _environment() -> dict[str, str]:
    """The environment variables that change what is measured, without values that are paths of this machine."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and "/" not in value and ";" not in value
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
