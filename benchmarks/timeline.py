"""One step on all ranks as a trace: compute, codecs, and each bucket's time on the wire, on one clock.

    mpirun -np 2 --bind-to none python benchmarks/timeline.py examples/quickstart.toml --output trace.json
    mpirun -np 2 --bind-to none python benchmarks/timeline.py CONFIG --compression.codec topk

Open the file in https://ui.perfetto.dev or chrome://tracing. A rank is a process there; its threads are the compute
thread and each lane of the gradient exchange. Buckets that an engine sums by itself are not in it: it does not say when
they travel (with Horovod, HOROVOD_TIMELINE does); with `--comm.algorithm ring` all are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.results import write_text
from common.script import absolute_path, run_script
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config, load
from hvdlm.data.shard import DataSet
from hvdlm.model.presets import PRESETS
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.replicas import broadcast_tensors
from hvdlm.training.trainer import Trainer
from study.clocks import offsets

_MICROSECONDS = 1e6


def trace(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains a few steps and writes the last one."""
    config = load(options.config, [*overrides, "--log.every", str(10**6)], PRESETS)
    keep_memory()
    with job(config.comm.engine, config.comm.timeout, config.digest()) as communicator:
        own = _last_step(config, communicator, options.warmup_steps)
        clock, error = offsets(communicator)
        everyone = communicator.all_gather_object(own)
        if communicator.rank == 0:
            _write(options.output, config, communicator, everyone, clock, error)


def _last_step(config: Config, communicator: Communicator, warmup_steps: int) -> list[list[tuple[str, float, float]]]:
    """Spans by thread: compute, then of each lane its buckets and the exchanges among them."""
    device = choose_device(config.train.device, communicator)
    share_cores(config.train.threads, communicator)
    data = DataSet(Path(config.data.path))
    trainer = Trainer(config, communicator, data, config.model.vocab_size or data.vocab_size, device)
    broadcast_tensors(communicator, trainer.parameters.values())
    trainer.model.refresh()
    loader = trainer.open_loader()
    for _ in range(warmup_steps + 1):
        trainer.train_step(loader, stop_here=False)
    begin = trainer.laps.begin
    threads = [[(name, begin + start, begin + end) for name, start, end in trainer.laps.spans()]]
    for lane in trainer.sync.lanes:
        spans = [*lane.spans, *lane.exchange.spans]
        threads.append([(span.name, span.begin, span.end) for span in spans])
    return threads


def _write(
    output: Path,
    config: Config,
    communicator: Communicator,
    everyone: Sequence[list[list[tuple[str, float, float]]]],
    clock: Sequence[float],
    error: float,
) -> None:
    """The format is that of Chrome's trace events: complete ("X") ones, in microseconds."""
    zero = min(begin - clock[rank] for rank, threads in enumerate(everyone) for _, begin, _ in threads[0])
    events: list[dict[str, Any]] = []
    for rank, threads in enumerate(everyone):
        name = f"rank {rank} on {communicator.hosts[rank]}"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for number, spans in enumerate(threads):
            thread = "compute" if number == 0 else f"lane {number}"
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": thread}})
            for what, begin, end in spans:
                at, lasts = (begin - clock[rank] - zero) * _MICROSECONDS, (end - begin) * _MICROSECONDS
                category = "compute" if number == 0 else "codec" if what.startswith("bucket") else "wire"
                events.append(
                    {"ph": "X", "name": what, "cat": category, "pid": rank, "tid": number, "ts": at, "dur": lasts}
                )
    said = {
        "engine": communicator.engine,
        "codec": config.compression.codec,
        "ranks": communicator.size,
        "clock_error_seconds": error,
    }
    write_text(output, json.dumps({"traceEvents": events, "otherData": said}) + "\n")
    print(f"{output}: {len(events)} events of {communicator.size} ranks, clocks within {error * _MICROSECONDS:.0f} us")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path, metavar="CONFIG", help="as of hvdlm train")
    parser.add_argument(
        "--output", type=absolute_path, default=Path("trace.json").absolute(), help="default: trace.json"
    )
    parser.add_argument("--warmup-steps", type=int, default=5, help="before the one that is traced")
    return parser.parse_known_args()


if __name__ == "__main__":
    run_script("timeline.py", lambda: trace(*_parse()))
