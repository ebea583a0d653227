"""The rows of layouts.py: the seconds of a step in each layout, measured and forecast."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.methods import parse_method
from common.results import markdown_table
from common.setups import Setup
from compare.measurement import Measurement, SystemResult
from compare.registry import LIMIT, hvdlm_name
from hvdlm.cluster.fabric.network import burst_bytes
from hvdlm.comm.mesh import mesh_shape
from hvdlm.comm.rate import parse_rate
from hvdlm.config import Config
from hvdlm.model.layout import Layout
from hvdlm.scaling.forecast_options import ForecastOptions
from hvdlm.scaling.layout_commands import forecast_cluster
from hvdlm.scaling.layout_forecast import LayoutForecast
from hvdlm.scaling.layout_search import choice
from hvdlm.scaling.rank_speed import rank_speed

_COLUMNS = ("", "layout", "measured, ms", "forecast, ms", "residual", "of it computing", "tensor", "bubble", "exposed")


@dataclass(frozen=True)
class LayoutRow:
    """A layout: medians over rounds, in seconds of a step."""

    method: str
    layout: str
    measured: float
    forecast: float  # from one rank's speed in the same round
    residual: float  # forecast over measured in the same round, less one
    parts: Mapping[str, float]  # of the forecast of the median round


def make_rows(
    methods: Sequence[str],
    results: Sequence[SystemResult],
    config: Config,
    vocab_size: int,
    setup: Setup,
    inside_link: str | None,
) -> list[LayoutRow]:
    """A row for each method that was measured in any round. `config`: of all systems. `inside_link`: what joins the
    ranks of one host, as `hvdlm predict --intra-node` takes it.
    """
    by_name = {result.name: result.measurements for result in results}
    rows = []
    for method in methods:
        pairs = [
            (limit, own)
            for limit, own in zip(by_name[LIMIT], by_name[hvdlm_name("mpi", method)], strict=True)
            if limit is not None and own is not None
        ]
        if pairs:
            rows.append(
                _row(method, pairs, parse_method(method).apply(config, setup.ranks), vocab_size, setup, inside_link)
            )
    return rows


def root_mean_square(rows: Sequence[LayoutRow]) -> float:
    """Of the residuals."""
    return math.sqrt(statistics.fmean(row.residual**2 for row in rows))


def table(results: Mapping[str, Any]) -> str:
    """Markdown of the results in layouts.json: a table for each set-up, and the root mean square of all."""
    parts = [_setup_table(result) for result in results.values()]
    squares = [row["residual"] ** 2 for result in results.values() for row in result["rows"]]
    within = sum(square <= 0.1**2 for square in squares)
    parts.append(
        f"All: root mean square {math.sqrt(statistics.fmean(squares)):.1%}; {within} of {len(squares)} forecasts are "
        "within 10%.\n"
    )
    return "\n".join(parts)


def as_record(rows: Sequence[LayoutRow]) -> dict[str, Any]:
    """For layouts.json."""
    return {"rows": [asdict(row) for row in rows], "root_mean_square": root_mean_square(rows)}


def _row(
    method: str,
    pairs: Sequence[tuple[Measurement, Measurement]],
    config: Config,
    vocab_size: int,
    setup: Setup,
    inside_link: str | None,
) -> LayoutRow:
    layout = Layout.of_mesh(config.parallel, mesh_shape(config.parallel, setup.ranks))

    def forecast(limit_seconds: float) -> LayoutForecast:
        tokens = config.train.global_batch_size // setup.ranks * config.model.context_length
        speed = rank_speed(config, vocab_size, None, None, tokens / limit_seconds)
        options = ForecastOptions(
            str(setup.ranks), 1 if setup.rate else setup.ranks, link=setup.rate, inside_link=inside_link
        )
        cluster = forecast_cluster(None, speed, config, options)
        if setup.rate:
            cluster = replace(cluster, burst=burst_bytes(parse_rate(setup.rate)))
        return choice(config, vocab_size, layout, config.train.global_batch_size, cluster).step

    forecasts = [forecast(limit.step_seconds) for limit, _ in pairs]
    measured = [own.step_seconds for _, own in pairs]
    median = sorted(forecasts, key=lambda each: each.seconds)[len(forecasts) // 2]
    return LayoutRow(
        method,
        str(layout),
        statistics.median(measured),
        statistics.median(each.seconds for each in forecasts),
        statistics.median(each.seconds / own - 1 for each, own in zip(forecasts, measured, strict=True)),
        asdict(median),
    )


def _setup_table(result: Mapping[str, Any]) -> str:
    setup, machine, settings = result["setup"], result["machine"], result["settings"]
    hosts = f"one per host, links of {setup['rate']}" if setup["rate"] else "on one host"
    conditions = (
        f"{setup['ranks']} ranks {hosts}, {settings['micro_batches']} micro-batches for each, {machine['cores']} cores "
        f"of {machine['cpu']}; medians of {settings['rounds']} rounds of {settings['steps']} steps, {result['date']}. "
        f"One rank alone: {result['tokens_per_second']:,.0f} tokens/s. "
    )
    if result["inside_link"]:
        conditions += f"Between ranks of the host: {result['inside_link']} as measured by allreduce.py. "
    conditions += f"Root mean square of residuals: {result['root_mean_square']:.1%}."
    cells = [_cells(row) for row in result["rows"]]
    return f"## {setup['name']}\n\n{conditions}\n\n{markdown_table(_COLUMNS, cells)}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    parts = row["parts"]
    milliseconds = [f"{1e3 * parts[name]:,.1f}" for name in ("tensor", "bubble", "exposed")]
    return [
        row["method"],
        row["layout"],
        f"{1e3 * row['measured']:,.1f}",
        f"{1e3 * row['forecast']:,.1f}",
        f"{row['residual']:+.1%}",
        f"{1e3 * (parts['compute'] + parts['optimizer']):,.1f}",
        *milliseconds,
    ]
