"""The speed of all-reduce from 4 bytes to 1 GB, by every available implementation; each sum is checked.

    mpirun -np 2 --bind-to none python benchmarks/allreduce.py
    horovodrun --gloo -np 2 python benchmarks/allreduce.py --largest 64mb
    srun --mpi=pmix python benchmarks/allreduce.py --codecs topk powersgd

Definitions are those of nccl-tests (doc/PERFORMANCE.md): algorithm bandwidth is bytes over seconds; bus bandwidth is
that times 2 (n - 1) / n, which cannot exceed the rate of a link on any number of ranks. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from common.conditions import describe_run
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, run_script
from hvdlm.cluster.doctor.measure import AllReduce
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.connect import connect
from hvdlm.comm.launch import detect
from hvdlm.errors import HvdlmError
from hvdlm.training.hardware import choose_device, share_cores
from scaling.collectives import Way, has_horovod, ways_of_engine, ways_of_ring

_WARM_UP = 2  # iterations
_MIN_ITERATIONS, _MAX_ITERATIONS = 5, 200
_SECONDS = 1.0  # that the measured iterations take, about
_PERIOD = 7  # of the repeating integers that are summed

_UNITS = {"b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


@dataclass(frozen=True)
class Row:
    """One implementation at one size. Percentiles are over iterations, in seconds of the slowest rank."""

    way: str
    dtype: str
    nbytes: int
    iterations: int
    p50: float
    p95: float
    p99: float
    slowest_rank: int  # the rank with the longest median
    algorithm_bandwidth: float  # bytes/s
    bus_bandwidth: float  # bytes/s
    wrong: int  # elements, over all ranks; with lossy codecs those in which ranks differ


def run(options: argparse.Namespace) -> None:
    """Checks and times every implementation at every size, and writes the results."""
    launch = detect(os.environ)
    engines = options.engines or _available(launch.launcher)
    communicators = [connect(engine, options.timeout) for engine in engines]
    first = communicators[0]
    share_cores(0, first)
    device = choose_device(options.device, first)
    ways = [way for communicator in communicators for way in ways_of_engine(communicator, device)]
    ways += ways_of_ring(first, device, ["fp16", "bf16", *options.codecs])
    rows: list[Row] = []
    for nbytes in _sizes(options.smallest, options.largest, options.factor):
        for way in ways:
            for dtype in way.dtypes:
                if str(dtype).removeprefix("torch.") in options.dtypes and nbytes >= dtype.itemsize:
                    rows.append(_row(way, dtype, nbytes, first, device))
                    if first.rank == 0:
                        print(_line(rows[-1]), flush=True)
    wrong = [row for row in rows if row.wrong]
    if first.rank == 0:
        _write(rows, launch.launcher, first, options)
    for communicator in reversed(communicators):
        communicator.barrier()
        communicator.close()
    if wrong:
        raise HvdlmError(f"wrong sums: {', '.join(f'{row.way} {row.dtype} {row.nbytes} bytes' for row in wrong)}")


def _row(way: Way, dtype: torch.dtype, nbytes: int, communicator: Communicator, device: torch.device) -> Row:
    """Checks one sum, then times some. Collective."""
    length = nbytes // dtype.itemsize
    own, expected = _integers(communicator.rank, communicator.size, length, dtype)
    values = own.to(device, copy=True)

    def reduce() -> float:
        begin = time.perf_counter()
        way.reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    reduce()
    if way.is_exact:
        wrong = int((values.cpu() != expected).sum())
    else:
        digests = communicator.all_gather_object(hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest())
        wrong = 0 if len(set(digests)) == 1 else length
    wrong = sum(communicator.all_gather_object(wrong))
    for _ in range(_WARM_UP):
        values.zero_()
        seconds = reduce()
    once = max(communicator.all_gather_object(seconds))
    iterations = int(min(max(_SECONDS / once, _MIN_ITERATIONS), _MAX_ITERATIONS))
    communicator.barrier()
    by_rank = np.array(communicator.all_gather_object([reduce() for _ in range(iterations)]))  # (ranks, iterations)
    p50, p95, p99 = (float(each) for each in np.percentile(by_rank.max(axis=0), [50, 95, 99]))
    return Row(
        way.name,
        str(dtype).removeprefix("torch."),
        nbytes,
        iterations,
        p50,
        p95,
        p99,
        int(np.median(by_rank, axis=1).argmax()),
        nbytes / p50,
        AllReduce(communicator.size, nbytes, p50).bus_bandwidth,
        wrong,
    )


def _integers(rank: int, size: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's integers, and their sum over all ranks, which is exact in every dtype (bfloat16: up to 85 ranks)."""
    index = torch.arange(_PERIOD)
    of_ranks = torch.stack([(index + each) % 3 + 1 for each in range(size)])  # (ranks, period)
    repeats = -(-length // _PERIOD)
    own, expected = of_ranks[rank].to(dtype), of_ranks.sum(0).to(dtype)
    return own.repeat(repeats)[:length].contiguous(), expected.repeat(repeats)[:length]


def _available(launcher: str) -> list[str]:
    """The engines that can connect the ranks of this job, that of the launcher first."""
    if launcher == "none":
        return ["solo"]
    by_mpi = launcher in ("mpirun", "srun")
    return [*(["mpi"] if by_mpi else []), *(["horovod"] if has_horovod() else []), "torch"]


def _sizes(smallest: int, largest: int, factor: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] * factor <= largest:
        sizes.append(sizes[-1] * factor)
    return sizes


def _line(row: Row) -> str:
    return (
        f"{row.nbytes:>12,} B  {row.dtype:9} {row.way:30} p50 {row.p50 * 1e6:>12,.1f} us  p95 {row.p95 * 1e6:>12,.1f}  "
        f"p99 {row.p99 * 1e6:>12,.1f}  algbw {row.algorithm_bandwidth / 1e9:7.3f} GB/s  "
        f"busbw {row.bus_bandwidth / 1e9:7.3f} GB/s  slowest rank {row.slowest_rank}  wrong {row.wrong}"
    )


def _write(rows: Sequence[Row], launcher: str, communicator: Communicator, options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    results = {
        **describe_run(),
        "launcher": launcher,
        "ranks": communicator.size,
        "hosts": communicator.hosts,
        "link": options.link,
        "rows": [asdict(row) for row in rows],
    }
    write_results(options.output / f"allreduce-{options.name}.json", results)
    write_text(options.output / f"allreduce-{options.name}.md", _table(rows))


def _table(rows: Sequence[Row]) -> str:
    columns = ("bytes", "dtype", "", "p50 us", "p95 us", "p99 us", "algbw GB/s", "busbw GB/s", "slowest rank", "wrong")
    table_rows = []
    for row in rows:
        times = (f"{each * 1e6:,.1f}" for each in (row.p50, row.p95, row.p99))
        speeds = (f"{each / 1e9:.3f}" for each in (row.algorithm_bandwidth, row.bus_bandwidth))
        cells = (f"{row.nbytes:,}", row.dtype, row.way, *times, *speeds, str(row.slowest_rank), str(row.wrong))
        table_rows.append(cells)
    return markdown_table(columns, table_rows)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)(b|kb|mb|gb)", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number and b, kb, mb or gb, as in 64mb")
    return int(found.group(1)) * _UNITS[found.group(2)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", type=_bytes, default="4b", help="default: %(default)s")
    parser.add_argument("--largest", type=_bytes, default="1gb", help="default: %(default)s, 2**30 bytes")
    parser.add_argument("--factor", type=int, default=4, choices=[2, 4, 8, 16], help="from one size to the next")
    parser.add_argument("--engines", nargs="+", choices=["mpi", "horovod", "torch"], help="default: all available")
    parser.add_argument("--codecs", nargs="*", default=[], help="besides fp16 and bf16, on the first engine's ring")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16", "int32"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="of the tensors")
    parser.add_argument("--link", help="rate between hosts, as 1gbit, which report.py draws beside the results")
    parser.add_argument("--name", default="results", help="of the files: allreduce-NAME.json and .md")
    parser.add_argument("--output", type=absolute_path, default=RESULTS)
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank waits for another rank")
    return parser.parse_args()


if __name__ == "__main__":
    run_script("allreduce.py", lambda: run(_parse()))
