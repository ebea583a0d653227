"""Measuring a system: the steps of one round, on one rank and over all ranks, and how far trained models differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector

from compare.systems import System
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.model.transformer import Transformer


@dataclass(frozen=True)
class Request:
    """Asks all ranks of a job to measure one system; rank 0 then saves the parameters to `parameters`, if given."""

    system: str
    steps: int
    parameters: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """A system in one round, on one rank or over all ranks; means over its steps."""

    step_seconds: float
    waited_seconds: float | None  # for other ranks; None: the system does not report it
    wire_bytes: float | None  # sent by a rank, as the system reports
    interface_bytes: float | None  # sent by a host's network interface, as the kernel counts; None: no interface
    peak_interface_rate: float | None  # bytes/s of it in the step that had most


@dataclass
class SystemResult:
    """All measurements of a system."""

    name: str
    measurements: list[Measurement | None] = field(default_factory=list)  # by round; None: its job crashed
    starts: int = 0  # of its job
    crashes: list[str] = field(default_factory=list)  # of its job: the cause of each
    relative_distance: float | None = None  # from the reference after equal steps; None: cannot be compared


def measure(system: System, steps: int, interface: str | None) -> Measurement:
    """Trains one step that is not measured, then `steps` that are; `interface` is the one whose bytes are counted.

    The unmeasured step takes up the different times at which suspended ranks resume, and fills the caches; what it has
    begun to send has arrived when the clock starts.
    """
    system.step()
    system.arrive()
    reports = []
    moments = [(time.perf_counter(), _bytes_sent(interface))]
    for number in range(steps):
        reports.append(system.step())
        if number == steps - 1:
            system.arrive()  # what it has begun to send counts to these steps
        moments.append((time.perf_counter(), _bytes_sent(interface)))
    told = [report for report in reports if report is not None]
    (begin, sent_before), (end, sent_after) = moments[0], moments[-1]
    return Measurement(
        (end - begin) / steps,
        statistics.fmean(report.waited_seconds for report in told) if told else None,
        statistics.fmean(report.wire_bytes for report in told) if told else None,
        (sent_after - sent_before) / steps if interface else None,
        max((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(moments)) if interface else None,
    )


def over_ranks(measurements: Sequence[Measurement]) -> Measurement:
    """The measurements of all ranks as one: seconds of the slowest rank, mean bytes of a rank."""
    waited = [each.waited_seconds for each in measurements if each.waited_seconds is not None]
    wire = [each.wire_bytes for each in measurements if each.wire_bytes is not None]
    interface = [each.interface_bytes for each in measurements if each.interface_bytes is not None]
    peaks = [each.peak_interface_rate for each in measurements if each.peak_interface_rate is not None]
    return Measurement(
        max(each.step_seconds for each in measurements),
        max(waited) if waited else None,
        statistics.fmean(wire) if wire else None,
        statistics.fmean(interface) if interface else None,
        max(peaks) if peaks else None,
    )


def relative_distance(own: Path, reference: Path, config: Config) -> float:
    """The distance between two systems' saved parameters after equal steps, over the reference's from its start."""
    model = Transformer(config.model, DataSet(Path(config.data.path)).vocab_size)
    model.initialise(config.train.seed)
    start = parameters_to_vector(model.parameters()).detach()
    trained, expected = torch.load(own), torch.load(reference)
    return float((trained - expected).norm() / (expected - start).norm())


def _bytes_sent(interface: str | None) -> int:
    if interface is None:
        return 0
    return int(Path("/sys/class/net", interface, "statistics", "tx_bytes").read_text(encoding="ascii"))
