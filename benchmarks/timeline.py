"""A trace of one step on all ranks: compute, codecs, and the messages of each bucket, on one clock.

    mpirun -np 2 --bind-to none python benchmarks/timeline.py examples/quickstart.toml --output trace.json
    mpirun -np 2 --bind-to none python benchmarks/timeline.py CONFIG --compression.codec topk

Open the file in https://ui.perfetto.dev or chrome://tracing. A rank is a process there; its threads are the compute
thread and each channel of the gradient exchange. Buckets that an engine reduces by its own all-reduce are not in the
trace, as the engine does not report when their messages travel (Horovod writes them to HOROVOD_TIMELINE); with
`--comm.algorithm ring` all buckets are. Of a parameter server it shows when it adds a worker's gradients and updates.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.results import write_text
from common.script import absolute_path, run_script
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.strategies.server.group import join_server_group
from hvdlm.strategies.server.synchronous import SynchronousServer
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.serving import make_server
from hvdlm.training.trainer import Trainer

_MICROSECONDS = 1e6
_CLOCK_ROUNDS = 50  # of messages by which clocks are compared

Spans = list[tuple[str, float, float]]  # names, begins and ends, in seconds of time.perf_counter()


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains a few steps and writes a trace of the last one."""
    config = load(options.config, [*overrides, "--log.every", str(10**6)], PRESETS)
    if config.server.max_staleness:
        raise HvdlmError("workers that do not wait for one another have no step in common: leave out max_staleness")
    keep_memory()
    with job(config.comm.engine, config.comm.timeout, config.digest()) as communicator:
        offsets, error = clock_offsets(communicator)
        own = _last_step(config, communicator, options.warmup_steps)
        ranks = communicator.all_gather_object(own)
        if communicator.rank == 0:
            _write(options.output, config, communicator, ranks, offsets, error)


def _last_step(config: Config, communicator: Communicator, warmup_steps: int) -> list[Spans]:
    """Spans by thread: compute first, then for each channel its buckets and the exchanges within them. Of a server
    there is one thread.
    """
    device = choose_device(config.train.device, communicator)
    share_cores(config.train.threads, communicator)
    data = DataSet(Path(config.data.path))
    vocab_size = config.model.vocab_size or data.vocab_size
    if not config.server.ranks:
        return _trained(Trainer(config, communicator, data, vocab_size, device), warmup_steps)
    servers, alike = join_server_group(communicator, config, device)
    if servers.is_server:
        server = make_server(servers, config, vocab_size, alike, lambda: False)
        server.run()
        servers.leave(have_died=False)
        assert isinstance(server, SynchronousServer)
        return [[tuple(span) for span in server.spans]]
    threads = _trained(Trainer(config, alike, data, vocab_size, device, servers), warmup_steps)
    servers.end(0, alike)
    return threads


def _trained(trainer: Trainer, warmup_steps: int) -> list[Spans]:
    trainer.start()
    loader = trainer.open_loader()
    for _ in range(warmup_steps + 1):
        trainer.train_step(loader, stop_here=False)
    begin = trainer.timer.begin
    threads = [[(name, begin + start, begin + end) for name, start, end in trainer.timer.spans()]]
    for channel in trainer.strategy.channels:
        threads.append([tuple(span) for span in channel.last_spans if span.end > begin])
    trainer.strategy.close()
    return threads


def _write(
    output: Path,
    config: Config,
    communicator: Communicator,
    ranks: Sequence[list[Spans]],
    offsets: Sequence[float],
    error: float,
) -> None:
    """Writes Chrome's trace event format: complete ("X") events, in microseconds."""
    workers = len(ranks) - config.server.ranks
    zero = min(begin - offsets[rank] for rank, threads in enumerate(ranks[:workers]) for _, begin, _ in threads[0])
    events: list[dict[str, Any]] = []
    for rank, threads in enumerate(ranks):
        name = f"rank {rank} on {communicator.hosts[rank]}"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for number, spans in enumerate(threads):
            thread = f"channel {number}" if number else "server" if rank >= workers else "compute"
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": thread}})
            for what, begin, end in spans:
                start, duration = (begin - offsets[rank] - zero) * _MICROSECONDS, (end - begin) * _MICROSECONDS
                category = "compute" if number == 0 else "codec" if what.startswith("bucket") else "wire"
                event = {"ph": "X", "name": what, "cat": category, "ts": start, "dur": duration}
                events.append({**event, "pid": rank, "tid": number})
    other = {
        "engine": communicator.engine,
        "codec": config.compression.codec,
        "ranks": communicator.size,
        "clock_error_seconds": error,
    }
    write_text(output, json.dumps({"traceEvents": events, "otherData": other}) + "\n")
    print(f"{output}: {len(events)} events of {communicator.size} ranks, clocks within {error * _MICROSECONDS:.0f} us")


def clock_offsets(communicator: Communicator) -> tuple[list[float], float]:
    """Seconds to subtract from each rank's time.perf_counter() to get rank 0's, and the largest possible error.

    In each round all ranks gather the times at which they began it. A rank cannot have received a time before it was
    sent, nor the reverse: with offset o of rank r, begin_0 + o <= end_r and begin_r - o <= end_0. Many rounds leave a
    narrow interval (Cristian, "Probabilistic clock synchronization", Distributed Computing 3, 1989); its middle is
    returned. Works with any engine. Collective.
    """
    upper = float("inf")
    lowers = [-float("inf")] * communicator.size
    for _ in range(_CLOCK_ROUNDS):
        communicator.barrier()
        begin = time.perf_counter()
        begins = communicator.all_gather(torch.tensor([begin], dtype=torch.float64).view(torch.uint8))
        end = time.perf_counter()
        times = [float(each) for each in begins.view(torch.float64).flatten()]
        upper = min(upper, end - times[0])
        lowers = [max(before, at - end) for before, at in zip(lowers, times, strict=True)]
    of_ranks = communicator.all_gather_object((upper, lowers))
    bounds = [(of_ranks[0][1][rank], of_ranks[rank][0]) for rank in range(communicator.size)]  # lower: by rank 0
    bounds[0] = (0.0, 0.0)
    return [(low + high) / 2 for low, high in bounds], max((high - low) / 2 for low, high in bounds)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path, metavar="CONFIG", help="as for hvdlm train")
    parser.add_argument(
        "--output", type=absolute_path, default=Path("trace.json").absolute(), help="default: trace.json"
    )
    parser.add_argument("--warmup-steps", type=int, default=5, help="before the traced step")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script("timeline.py", lambda: run(*_parse()))
