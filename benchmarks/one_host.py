"""hvdlm beside PyTorch DDP on Gloo, the same training in the same processes, and the limit: no communication at all.

    mpirun -np 2 --bind-to none python benchmarks/one_host.py --data data/python-stdlib --output results.json

Every rank holds each contestant at once and they take turns, a few steps each, in an order that rotates from round
to round: what else the machine does meets all alike. A round's ratio compares neighbours in time; the figure is the
median of the rounds' ratios. Tokens per second are those of the slowest rank.

The model is a GPT of 10.7M parameters (6 layers, 6 heads, 384 wide, 256 context), bf16 autocast, 4 sequences a rank,
one CPU thread a rank. The peer is what a PyTorch user would write: DistributedDataParallel with
gradient_as_bucket_view, clip_grad_norm_ and fused AdamW around the same model, loss and batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hvdlm
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.launch import connect
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config, from_dict
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet
from hvdlm.model.loss import token_loss
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.training.hardware import share_cores
from hvdlm.training.optimizer import set_learning_rate
from hvdlm.training.schedule import learning_rate
from hvdlm.training.trainer import Trainer

SEQUENCES_A_RANK = 4
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="any data set of hvdlm prepare")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6, help="steps of each contestant in a round")
    parser.add_argument("--engine", default="mpi", help="hvdlm's engine (default: mpi)")
    parser.add_argument("--bucket-mb", type=float, default=Config().comm.bucket_mb)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    communicator = connect(options.engine, timeout=300)
    # The peer's process group; under --engine torch it is the one that hvdlm uses too.
    peer = communicator if options.engine == "torch" else connect("torch", timeout=300)
    data = DataSet(options.data)
    config = configure(options, SEQUENCES_A_RANK * communicator.size)
    threads = share_cores(1, communicator)
    contestants = {
        "no communication": hvdlm_steps(configure(options, SEQUENCES_A_RANK), SoloCommunicator(), data),
        f"hvdlm {options.engine}": hvdlm_steps(config, communicator, data),
        "PyTorch DDP gloo": ddp_steps(config, communicator, data),
    }
    rates = race(contestants, communicator, options.rounds, options.steps, config.model.context_length)
    check_answers(contestants[f"hvdlm {options.engine}"][1], contestants["PyTorch DDP gloo"][1])
    if communicator.rank == 0:
        report(rates, options, communicator, threads)
    communicator.barrier()
    if peer is not communicator:
        peer.close()
    communicator.close()


def configure(options: argparse.Namespace, batch_size: int) -> Config:
    settings = {
        "model": {"layers": 6, "heads": 6, "width": 384, "context_length": 256},
        "train": {"batch_size": batch_size, "micro_batch_size": SEQUENCES_A_RANK, "precision": "bf16", "steps": 10**6},
        "comm": {"bucket_mb": options.bucket_mb},
        "log": {"every": 10**6},
        "data": {"path": str(options.data)},
    }
    return from_dict(settings, "one_host.py", PRESETS)


Step = Callable[[], None]


def hvdlm_steps(config: Config, communicator: Communicator, data: DataSet) -> tuple[Step, Transformer]:
    trainer = Trainer(config, communicator, data, data.vocab_size, CPU)
    loader = trainer.open_loader()

    def step() -> None:
        trainer.train_step(loader, stop_here=False)

    return step, trainer.model


def ddp_steps(config: Config, communicator: Communicator, data: DataSet) -> tuple[Step, Transformer]:
    trainer = Trainer(config, SoloCommunicator(), data, data.vocab_size, CPU)  # for its model and optimizer alone
    model, optimizer = trainer.model, trainer.optimizer
    for parameter in model.parameters():
        parameter.grad = None
        parameter._post_accumulate_grad_hooks.clear()
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    loader = Loader(
        data, config.model.context_length, config.train.batch_size, 0, communicator.rank, communicator.size, 2
    )

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, config.train.steps, config.optimizer))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = token_loss(replica(batch.inputs), model.output_weight, batch.targets) / batch.targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def race(
    contestants: dict[str, tuple[Step, Transformer]], communicator: Communicator, rounds: int, steps: int, context: int
) -> dict[str, list[float]]:
    """Tokens per second of the whole job, by contestant and round."""
    tokens = steps * SEQUENCES_A_RANK * communicator.size * context
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for round_number in range(-1, rounds):  # round -1 warms up and is not counted
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            communicator.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                contestants[name][0]()
            seconds = max(communicator.all_gather_object(time.perf_counter() - begin))
            if round_number >= 0:
                rates[name].append(tokens / seconds)
    return rates


def check_answers(ours: Transformer, theirs: Transformer) -> None:
    """After equal steps on equal batches both hold the same model, up to the rounding of bf16."""
    moved = distance = 0.0
    begin = Transformer(ours.config, ours.vocab_size)
    begin.initialise(0)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), begin.parameters(), strict=True):
        distance += float((a - b).detach().square().sum())
        moved += float((a - c).detach().square().sum())
    ratio = (distance / moved) ** 0.5
    assert ratio < 0.1, f"the contestants have trained different models: {ratio:.3f} of the way apart"


def report(
    rates: dict[str, list[float]], options: argparse.Namespace, communicator: Communicator, threads: int
) -> None:
    peer = rates["PyTorch DDP gloo"]
    limit = rates["no communication"]
    rows = {
        name: {
            "tokens_per_second": statistics.median(values),
            "ratio_to_ddp": statistics.median(a / b for a, b in zip(values, peer, strict=True)),
            "ratio_to_limit": statistics.median(a / b for a, b in zip(values, limit, strict=True)),
            "rounds": values,
        }
        for name, values in rates.items()
    }
    print(f"{'':20} {'tokens/s':>10} {'of DDP':>8} {'of limit':>8}")
    for name, row in rows.items():
        print(f"{name:20} {row['tokens_per_second']:10,.0f} {row['ratio_to_ddp']:8.3f} {row['ratio_to_limit']:8.3f}")
    if options.output:
        result = {
            "machine": {"host": socket.gethostname(), "cpu": cpu_model(), "cores": os.cpu_count()},
            "versions": {
                "hvdlm": hvdlm.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "mpi": mpi_version(),
            },
            "settings": {
                "ranks": communicator.size,
                "threads_a_rank": threads,
                "steps_a_round": options.steps,
                "bucket_mb": options.bucket_mb,
                "peer": f"DistributedDataParallel, {dist.get_backend()}",
            },
            "results": rows,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def mpi_version() -> str:
    from mpi4py import MPI

    return MPI.Get_library_version().split(",")[0]


if __name__ == "__main__":
    main()
