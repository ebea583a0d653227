"""The summary of a comparison: medians over its rounds, reasons not to use them, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.results import format_number, markdown_table
from compare.measurement import Measurement, SystemResult
from compare.registry import LIMIT, REFERENCE, is_dense, is_hvdlm

# What rounding to 16-bit numbers may make of the relative distance between two dense systems.
MAX_DISTANCE = 0.1

_COLUMNS = ("", "tokens/s", "of limit", "of DDP", "exposed ms", "waited ms", "wire MB", "interface MB", "peak MB/s", "")


@dataclass(frozen=True)
class SummaryRow:
    """A row of the table; None where nothing was measured. benchmarks/README.md defines each column."""

    name: str
    tokens_per_second: float | None
    of_limit: float | None
    of_ddp: float | None
    exposed_seconds: float | None
    waited_seconds: float | None
    wire_bytes: float | None
    interface_bytes: float | None
    peak_interface_rate: float | None
    starts: int
    crashes: int


def summarise(results: Sequence[SystemResult], tokens_per_step: int) -> list[SummaryRow]:
    """One row per system, in the order of `results`. Ratios are between measurements of the same round."""
    by_name = {result.name: result.measurements for result in results}
    limit, reference = by_name[LIMIT], by_name[REFERENCE]

    def row(result: SystemResult) -> SummaryRow:
        own = result.measurements
        return SummaryRow(
            name=result.name,
            tokens_per_second=_median([tokens_per_step / each.step_seconds for each in own if each]),
            of_limit=_median(_by_round(own, limit, lambda a, b: b.step_seconds / a.step_seconds)),
            of_ddp=_median(_by_round(own, reference, lambda a, b: b.step_seconds / a.step_seconds)),
            exposed_seconds=_median(_by_round(own, limit, lambda a, b: a.step_seconds - b.step_seconds)),
            waited_seconds=_median([each.waited_seconds for each in own if each]),
            wire_bytes=_median([each.wire_bytes for each in own if each]),
            interface_bytes=_median([each.interface_bytes for each in own if each]),
            peak_interface_rate=_median([each.peak_interface_rate for each in own if each]),
            starts=result.starts,
            crashes=len(result.crashes),
        )

    return [row(result) for result in results]


def find_problems(results: Sequence[SystemResult]) -> list[str]:
    """The reasons not to use these figures, one sentence each."""
    found = []
    for result in results:
        distance = result.relative_distance
        if is_hvdlm(result.name) and result.crashes:
            found.append(f"{result.name} crashed: {result.crashes[0]}")
        elif is_dense(result.name) and distance is not None and distance > MAX_DISTANCE:
            found.append(
                f"{result.name} and {REFERENCE} have trained different models, whose relative distance after equal "
                f"steps is {distance:.3f}, and not below {MAX_DISTANCE:g}"
            )
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown of the results in compare.json: one table per set-up, under its name, machine and settings."""
    return "\n".join(_setup_table(result) for result in results.values())


def _setup_table(result: Mapping[str, Any]) -> str:
    setup, machine, versions, settings = (result[key] for key in ("setup", "machine", "versions", "settings"))
    hosts = f"one per host, links of {setup['rate']}" if setup["rate"] else "on one host"
    conditions = (
        f"{setup['ranks']} ranks {hosts}, {machine['cores']} cores of {machine['cpu']}; "
        f"torch {versions['torch']}, {versions['mpi']}; "
        f"medians of {settings['rounds']} rounds of {settings['steps']} steps, {result['date']}."
    )
    return (
        f"## {setup['name']}\n\n{conditions}\n\n{markdown_table(_COLUMNS, [_cells(row) for row in result['summary']])}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    crashes = f"crashed in {row['crashes']} of {row['starts']} starts" if row["crashes"] else ""
    return [
        row["name"],
        format_number(row["tokens_per_second"], "{:,.0f}"),
        format_number(row["of_limit"], "{:.3f}"),
        format_number(row["of_ddp"], "{:.3f}"),
        format_number(row["exposed_seconds"], "{:,.1f}", 1e3),
        format_number(row["waited_seconds"], "{:,.1f}", 1e3),
        format_number(row["wire_bytes"], "{:,.2f}", 1e-6),
        format_number(row["interface_bytes"], "{:,.2f}", 1e-6),
        format_number(row["peak_interface_rate"], "{:,.2f}", 1e-6),
        crashes,
    ]


def _by_round(
    own: Sequence[Measurement | None],
    others: Sequence[Measurement | None],
    compare: Callable[[Measurement, Measurement], float],
) -> list[float]:
    return [compare(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
