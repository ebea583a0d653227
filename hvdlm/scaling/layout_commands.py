"""`hvdlm predict` for layouts: models that ranks divide among them, on machines that were measured or not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hvdlm.comm.mesh import mesh_shape
from hvdlm.comm.rate import parse_rate
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.model.layout import Layout
from hvdlm.scaling.cluster import (
    BETWEEN_LATENCY,
    INSIDE_LATENCY,
    LINK_SHARE,
    TCP_CORE_SECONDS,
    TCP_SHARE,
    Cluster,
    Link,
)
from hvdlm.scaling.forecast_options import ForecastOptions
from hvdlm.scaling.layout_forecast import utilisation
from hvdlm.scaling.layout_search import USABLE_MEMORY, Choice, choice, search
from hvdlm.scaling.performance_model import Network, PerformanceModel, interval
from hvdlm.scaling.published_runs import residuals, spread
from hvdlm.scaling.rank_speed import RankSpeed

_RANKS_PER_HOST = 8  # where nothing is said

_SHOWN = 6  # layouts of a search


def predict_layouts(
    model: PerformanceModel | None,
    speed: RankSpeed | None,
    config: Config,
    vocab_size: int,
    options: ForecastOptions,
    console: Console,
) -> None:
    """Prints speed and memory of the configured layout on each number of ranks, or of the fastest layouts.

    `model`: of a fit, whose links are used and, where `speed` is None, whose ranks. Raises HvdlmError for ranks that
    cannot be arranged, and for what is not known.
    """
    if config.local_steps.every:
        raise HvdlmError("local_steps.every is forecast from measurements of it: give a file of hvdlm fit")
    cluster = forecast_cluster(model, speed, config, options)
    if len(options.codecs) > 1:
        raise HvdlmError("layouts are forecast with one codec: give --codec once")
    if options.codecs:
        compression = config.compression.model_copy(update={"codec": options.codecs[0]})
        config = config.model_copy(update={"compression": compression})
    if options.search:
        if speed is None or speed.device is None:
            raise HvdlmError("--search looks for layouts that fit into memory: give --device")
        found = _search(config, vocab_size, options, cluster, speed)
    else:
        found = []
        for count in options.counts:
            layout = Layout.of_mesh(config.parallel, mesh_shape(config.parallel, count))
            found.append(choice(config, vocab_size, layout, _global_batch(config, options, layout), cluster))
    console.print(_table(found, model, speed))
    console.print(*_notes(found, model, speed, config, options), sep="\n")


def _search(
    config: Config, vocab_size: int, options: ForecastOptions, cluster: Cluster, speed: RankSpeed
) -> list[Choice]:
    if config.parallel.is_used:
        raise HvdlmError("--search chooses [parallel]: leave its settings out")
    if len(options.counts) > 1:
        raise HvdlmError(f"--search looks for layouts of one number of ranks, not of --ranks {options.ranks}")
    assert speed.device is not None
    (ranks,) = options.counts
    if options.batch_size_per_rank is not None:
        raise HvdlmError("--search compares layouts with one global batch: give --train.global_batch_size")
    memory = USABLE_MEMORY * speed.device.memory * 2**30
    return search(config, vocab_size, ranks, config.train.global_batch_size, cluster, memory)[:_SHOWN]


def _global_batch(config: Config, options: ForecastOptions, layout: Layout) -> int:
    if options.batch_size_per_rank is not None:
        return options.batch_size_per_rank * layout.batch_parts
    return config.train.global_batch_size


def forecast_cluster(
    model: PerformanceModel | None, speed: RankSpeed | None, config: Config, options: ForecastOptions
) -> Cluster:
    """Where the forecast runs. Raises HvdlmError for a speed or a link that is needed and not known."""
    per_host = options.ranks_per_host or (model.ranks_per_host if model else _RANKS_PER_HOST)
    if speed is None:
        if model is None:
            raise HvdlmError(
                "nothing says how fast a rank is: give --device and --mfu, one rank's --tokens-per-second, or a file "
                "of hvdlm fit"
            )
        flops = 1 / (model.forward_seconds_per_flop + model.backward_seconds_per_flop)
        computing = (flops, math.inf, model.optimizer_seconds_per_element)
    else:
        computing = (speed.product_flops, speed.memory_bandwidth, speed.optimizer_seconds)
    is_alone = max(options.counts) == 1
    inside = _inside(model, speed, options, is_needed=per_host > 1 and not is_alone)
    is_cpu = _computes_on_cpu(model, speed, config)
    between = _between(model, options, is_cpu, is_needed=max(options.counts) > per_host)
    if not is_cpu:
        return Cluster(*computing, per_host, inside, between)
    measured = model.codecs.get("none") if model else None
    core_seconds = measured.core_seconds_per_byte if measured else TCP_CORE_SECONDS
    return Cluster(*computing, per_host, inside, between, "cpu", core_seconds)


def _computes_on_cpu(model: PerformanceModel | None, speed: RankSpeed | None, config: Config) -> bool:
    return config.train.device == "cpu" if speed or model is None else not model.uses_gpu


_NO_LINK = Link(math.inf, 0.0)  # where no message goes


def _inside(model: PerformanceModel | None, speed: RankSpeed | None, options: ForecastOptions, is_needed: bool) -> Link:
    if options.inside_link:
        return _inside_link(parse_rate(options.inside_link))
    if model and model.inside:
        return _measured(model.inside, None)
    if speed and speed.device:
        return _inside_link(8e9 * speed.device.link)
    if is_needed:
        raise HvdlmError("nothing says what joins the ranks of a host: give --intra-node, as in --intra-node 3600gbit")
    return _NO_LINK


def _between(model: PerformanceModel | None, options: ForecastOptions, is_cpu: bool, is_needed: bool) -> Link:
    if model and model.between:
        known = [each for each in model.measured.links if each]
        rate = float(parse_rate(options.link)) if options.link else max(known, default=None)
        return _measured(model.between, rate)
    if options.link:
        share = TCP_SHARE if is_cpu else LINK_SHARE
        return Link(share * parse_rate(options.link) / 8, BETWEEN_LATENCY)
    if is_needed:
        raise HvdlmError("nothing says what joins the hosts: give --link, of each host, as in --link 3200gbit")
    return _NO_LINK


def _inside_link(bits_per_second: float) -> Link:
    return Link(LINK_SHARE * bits_per_second / 8, INSIDE_LATENCY)


def _measured(network: Network, rate: float | None) -> Link:
    return Link(network.bandwidth(rate) / 8, network.latency)


def _table(found: Sequence[Choice], model: PerformanceModel | None, speed: RankSpeed | None) -> Table:
    table = Table(
        *("ranks", "layout", "sequences at once", "tokens/s", "95% interval", "MFU", "step, s"),
        *("of it bubble, s", "exchange, s", "memory a rank, GiB"),
    )
    for each in found:
        scenario, step, ranks = each.scenario, each.step, each.scenario.layout.ranks
        factor = _interval(model, speed, ranks)
        at_once = f"{scenario.micro_batch_size}{'' if scenario.recomputed == 'none' else ', blocks recomputed'}"
        mfu = f"{utilisation(scenario, step.seconds, speed.peak):.1%}" if speed and speed.peak else ""
        memory = f"{each.memory.total / 2**30:,.1f}"
        if speed and speed.device:
            fits = each.memory.total <= USABLE_MEMORY * speed.device.memory * 2**30
            memory += f" of {speed.device.memory}{'' if fits else ': too much'}"
        table.add_row(
            *(f"{ranks:,}", str(scenario.layout), at_once, f"{each.tokens_per_second:,.0f}"),
            f"{each.tokens_per_second / factor:,.0f} to {each.tokens_per_second * factor:,.0f}",
            *(mfu, f"{step.seconds:,.2f}", f"{step.bubble:,.2f}", f"{step.tensor + step.exposed:,.2f}", memory),
        )
    return table


def _interval(model: PerformanceModel | None, speed: RankSpeed | None, ranks: int) -> float:
    """The upper bound of a forecast's 95% interval over the forecast, and the forecast over its lower bound."""
    if model and speed is None:
        return interval(model, ranks)
    return math.exp(2 * spread())


def _notes(
    found: Sequence[Choice],
    model: PerformanceModel | None,
    speed: RankSpeed | None,
    config: Config,
    options: ForecastOptions,
) -> list[str]:
    notes = []
    if options.search:
        notes.append(f"The fastest: {found[0].settings}")
    if speed is not None:
        notes.append(speed.describe(config.train.precision))
        count = sum(not each.is_fitted for each in residuals())
        notes.append(
            f"Intervals are twice the root mean square error, {spread():.0%}, of forecasts of {count} published runs "
            "by what a smaller run attains (python benchmarks/published_runs.py)."
        )
    if model is None:
        notes.append(f"Links are taken to carry {LINK_SHARE:.0%} of their rate{_of_tcp(model, speed, config)}.")
    return notes


def _of_tcp(model: PerformanceModel | None, speed: RankSpeed | None, config: Config) -> str:
    return f", those between hosts {TCP_SHARE:.0%}" if _computes_on_cpu(model, speed, config) else ""
