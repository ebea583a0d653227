"""The table of `hvdlm predict` for parameter servers, beside what the same workers do without servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from hvdlm.config import Config
from hvdlm.scaling.forecast import StepForecast, forecast
from hvdlm.scaling.performance_model import PerformanceModel, interval
from hvdlm.scaling.scenario import Scenario
from hvdlm.scaling.server_forecast import forecast_servers, workers_of


def server_table(
    model: PerformanceModel, codec: str, scenarios: Sequence[Scenario], one_rank: StepForecast
) -> tuple[Table, str]:
    """A row for each number of ranks, and a sentence about the most: what else they could do."""
    servers = scenarios[0].config.server.ranks
    kind = "asynchronous " if scenarios[0].config.server.max_staleness else ""
    columns = ("ranks", "workers", "tokens/s", "95% interval", "efficiency", "step, ms", "pushing, ms", "pulling, ms")
    title = f"codec {codec}, {servers} {kind}parameter server{'s' if servers > 1 else ''}"
    without = "of all-reduce"
    if every := scenarios[0].config.local_steps.every:
        title, without = f"{title}, local_steps.every = {every}", "of averages"
    table = Table(*columns, "update, ms", without, title=title, title_justify="left")
    for scenario in scenarios:
        step, workers = forecast_servers(model, scenario), workers_of(scenario)
        speed, factor = workers * scenario.tokens / step.seconds, interval(model, scenario.ranks)
        table.add_row(
            *(f"{scenario.ranks:,}", f"{workers:,}", f"{speed:,.0f}"),
            f"{speed / factor:,.0f} to {speed * factor:,.0f}",
            f"{one_rank.seconds / step.seconds:.1%}",
            *(f"{seconds * 1e3:,.1f}" for seconds in (step.seconds, step.pushing, step.pulling, step.update)),
            f"{forecast(model, _workers_alone(scenario)).seconds / step.seconds:.3f}",
        )
    last = scenarios[-1]
    twice = forecast_servers(model, _with_servers(last, 2 * servers))
    gain = forecast_servers(model, last).seconds / twice.seconds - 1
    return table, f"With {workers_of(last):,} workers, twice as many servers would change tokens/s by {gain:+.0%}."


def _workers_alone(scenario: Scenario) -> Scenario:
    machines = min(scenario.machines, workers_of(scenario))
    return replace(scenario, config=_config(scenario, 0), ranks=workers_of(scenario), machines=machines)


def _with_servers(scenario: Scenario, servers: int) -> Scenario:
    """As many workers with other servers, each on a host more if ranks have hosts of their own."""
    ranks = workers_of(scenario) + servers
    machines = -(-ranks // scenario.ranks_per_host) if scenario.machines == scenario.hosts else scenario.machines
    return replace(scenario, config=_config(scenario, servers), ranks=ranks, machines=machines)


def _config(scenario: Scenario, servers: int) -> Config:
    server = scenario.config.server.model_copy(update={"ranks": servers})
    return scenario.config.model_copy(update={"server": server})
