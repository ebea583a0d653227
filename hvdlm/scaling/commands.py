"""`hvdlm fit` and `hvdlm predict`: forecasts for other numbers of ranks, links and models, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hvdlm.comm.rate import parse_rate
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.scaling.cluster import INSIDE_LATENCY, LINK_SHARE
from hvdlm.scaling.codec_messages import can_push
from hvdlm.scaling.fit import fit
from hvdlm.scaling.forecast import StepForecast, forecast, local_interval
from hvdlm.scaling.forecast_options import ForecastOptions
from hvdlm.scaling.holdout import Holdout, hold_out, root_mean_square
from hvdlm.scaling.layout_commands import predict_layouts
from hvdlm.scaling.performance_model import CodecCost, Network, PerformanceModel, interval, read_model
from hvdlm.scaling.point import read_points, write_record
from hvdlm.scaling.rank_speed import RankSpeed, rank_speed
from hvdlm.scaling.scenario import Scenario, of_config
from hvdlm.scaling.server_table import server_table

# A forecast is called an extrapolation beyond this many times the measured ranks, or rates of links.
_RANGE = 4

# The efficiency at which `predict` says that a run stops scaling.
_MIN_EFFICIENCY = 0.5

_MAX_SHOWN_BUCKETS = 12

# Of the local steps that are advised, and the share of tokens/s below which none are
_FRAGMENTS = 2
_WORTHWHILE = 0.05

_WIDTH = 140  # columns, where the output is not a terminal


def write_fit(results: Path, output: Path) -> None:
    """Fits a model to all points of a study, prints the errors of held-out points, and writes the model."""
    points = [point for point in read_points(results) if point.is_valid]
    holdouts = hold_out(points)
    model = fit(points)
    held_out = [residual for holdout in holdouts for residual in holdout.residuals]
    which = "that were fitted"
    if held_out:
        model, which = model.model_copy(update={"residual": root_mean_square(held_out)}), "that were held out"
    console = _console()
    for holdout in holdouts:
        console.print(residual_table(holdout))
    for where, network in (("within a host", model.inside), ("between hosts", model.between)):
        if network:
            carried = f"{network.efficiency:.1%} of its rate"
            if network.bits_per_second is not None:
                carried = f"{network.bits_per_second / 1e9:,.2f} Gbit/s"
            console.print(f"{where} a link carries {carried}, with {network.latency * 1e6:,.0f} us per hop")
    console.print(
        f"{len(points)} points; forecasts of points {which} are off by {model.residual:.1%} (root mean square)"
    )
    write_record(output, model)


def residual_table(holdout: Holdout) -> Table:
    """A table of every held-out point."""
    title = f"{holdout.name}: MAPE {holdout.mape:.1%} over {len(holdout.residuals)} points"
    table = Table("ranks", "link", "codec", "measured, ms", "predicted, ms", "error", title=title, title_justify="left")
    for each in holdout.residuals:
        link = "" if each.link is None else f"{each.link / 1e6:,g} Mbit/s"
        seconds = (f"{each.measured * 1e3:,.1f}", f"{each.predicted * 1e3:,.1f}")
        table.add_row(str(each.ranks), link, each.codec, *seconds, f"{each.error:+.1%}")
    return table


def predict(file: Path | None, options: ForecastOptions) -> None:
    """Prints tokens/s, efficiency and exposed communication for each codec and number of ranks, and possible gains.

    Without a file of `hvdlm fit`, or with [parallel], prints the speed and memory of layouts. Raises HvdlmError for
    what was not measured.
    """
    model = None if file is None else read_model(file)
    if options.ranks_per_host is not None and options.ranks_per_host <= 0:
        raise HvdlmError(f"--per-node {options.ranks_per_host}: give a number above 0")
    config, console = _config(model, options), _console()
    if config.optimizer.algorithm in ("dion", "muon"):
        raise HvdlmError(
            f"optimizer.algorithm = {config.optimizer.algorithm!r} has no forecast: its ranks exchange other messages "
            "than gradients"
        )
    has_servers = config.server.ranks > 0
    if has_servers and (model is None or options.search):
        raise HvdlmError(
            "server.ranks is forecast from measured ranks and links: give a file of hvdlm fit, and no --search"
        )
    vocab_size = config.model.vocab_size or 257
    speed = rank_speed(config, vocab_size, options.device, options.mfu, options.tokens_per_second)
    if model is None or config.parallel.is_used or options.search:
        predict_layouts(model, speed, config, vocab_size, options, console)
        return
    codecs = options.codecs or [each for each in model.measured.codecs if not has_servers or can_push(each)]
    if speed is not None:
        codecs = _codecs_of_device(model, speed, codecs, options)
        model = with_speed(model, speed)
        console.print(speed.describe(config.train.precision))
    if options.inside_link:
        rate_inside = LINK_SHARE * parse_rate(options.inside_link)
        inside = Network(efficiency=1.0, latency=INSIDE_LATENCY, bits_per_second=rate_inside)
        model = model.model_copy(update={"inside": inside})
    counts = options.counts
    per_host = options.ranks_per_host or model.ranks_per_host
    rate = (
        float(parse_rate(options.link))
        if options.link
        else max((each for each in model.measured.links if each), default=None)
    )
    for codec in codecs:
        compression = config.compression.model_copy(update={"codec": codec})
        chosen = config.model_copy(update={"compression": compression})
        scenarios = [of_config(chosen, vocab_size, count, per_host, rate) for count in counts]
        one_rank = forecast(model, of_config(chosen, vocab_size, 1, per_host, rate))
        if has_servers:
            console.print(*server_table(model, codec, scenarios, one_rank), sep="\n")
            continue
        found = [forecast(model, scenario) for scenario in scenarios]
        console.print(_forecast_table(model, codec, scenarios, found, one_rank))
        console.print(*_advice(model, scenarios, found, one_rank), sep="\n")
        if not config.local_steps.every:
            console.print(_bucket_table(found[-1], counts[-1]))
    if has_servers:
        console.print("Intervals are those of all-reduces: `hvdlm fit` has no measurements of servers.")
    console.print(f"{counts[-1]:,} ranks take about {start_seconds(model, counts[-1]):,.0f} s to start.")


def _config(model: PerformanceModel | None, options: ForecastOptions) -> Config:
    arguments = ["--model.preset", options.preset] if options.preset else []
    arguments += ["--compression.candidates", model.measured.candidates] if model and model.measured.candidates else []
    arguments += options.overrides
    if options.batch_size_per_rank is not None:
        size = str(options.batch_size_per_rank)
        arguments += ["--train.global_batch_size", size, "--train.micro_batch_size", size]
    return load(None, arguments, PRESETS)


def _codecs_of_device(
    model: PerformanceModel, speed: RankSpeed, codecs: Sequence[str], options: ForecastOptions
) -> Sequence[str]:
    """Those whose costs are known on the device: what a CPU takes to encode says nothing of a GPU."""
    if speed.device is None or model.uses_gpu:
        return codecs
    if others := [codec for codec in options.codecs if codec != "none"]:
        raise HvdlmError(
            f"codec {others[0]} was measured on a CPU, which says nothing of {speed.device.name}: fit a study of GPUs, "
            "or give --codec none"
        )
    return ["none"]


def with_speed(model: PerformanceModel, speed: RankSpeed) -> PerformanceModel:
    """The same links with other ranks. On a GPU codec none costs no core's time."""
    old = 1 / (model.forward_seconds_per_flop + model.backward_seconds_per_flop)
    update: dict[str, object] = {
        "forward_seconds_per_flop": model.forward_seconds_per_flop * old / speed.overall_flops,
        "backward_seconds_per_flop": model.backward_seconds_per_flop * old / speed.overall_flops,
        "optimizer_seconds_per_element": speed.optimizer_seconds,
        "data_seconds": 0.0,
    }
    if speed.device is not None and not model.uses_gpu:
        update |= {"uses_gpu": True, "codecs": {"none": CodecCost(seconds_per_element=0.0, core_seconds_per_byte=0.0)}}
    return model.model_copy(update=update)


def start_seconds(model: PerformanceModel, ranks: int) -> float:
    """Seconds from the start of processes to the first step."""
    more = max(0, ranks - min(model.measured.ranks))
    return model.start_seconds + model.start_seconds_per_rank * more


def is_extrapolated(model: PerformanceModel, ranks: int, link: float | None) -> bool:
    """Whether this number of ranks, or this rate of links, is far from what was measured."""
    known = [rate for rate in model.measured.links if rate is not None]
    is_far = link is not None and bool(known) and not min(known) / _RANGE <= link <= max(known) * _RANGE
    return is_far or ranks > _RANGE * max(model.measured.ranks)


def _console() -> Console:
    """A console that is wide enough for the tables where the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _forecast_table(
    model: PerformanceModel,
    codec: str,
    scenarios: Sequence[Scenario],
    found: Sequence[StepForecast],
    one_rank: StepForecast,
) -> Table:
    columns = ("ranks", "tokens/s", "95% interval", "efficiency", "step, ms", "exposed, ms", "sent per rank, MB", "")
    title = f"codec {codec}{_local_steps_of(model, scenarios[-1])}"
    table = Table(*columns, title=title, title_justify="left")
    for scenario, step in zip(scenarios, found, strict=True):
        speed = scenario.ranks * scenario.tokens / step.seconds
        factor = interval(model, scenario.ranks)
        table.add_row(
            f"{scenario.ranks:,}",
            f"{speed:,.0f}",
            f"{speed / factor:,.0f} to {speed * factor:,.0f}",
            f"{one_rank.seconds / step.seconds:.1%}",
            f"{step.seconds * 1e3:,.1f}",
            f"{step.exposed * 1e3:,.1f}",
            f"{step.wire_bytes / 1e6:,.2f}",
            "extrapolated" if is_extrapolated(model, scenario.ranks, scenario.link) else "",
        )
    return table


def _advice(
    model: PerformanceModel, scenarios: Sequence[Scenario], found: Sequence[StepForecast], one_rank: StepForecast
) -> list[str]:
    """Where efficiency falls below the minimum, and what would change at the most ranks."""
    stops = [
        each.ranks
        for each, step in zip(scenarios, found, strict=True)
        if one_rank.seconds < _MIN_EFFICIENCY * step.seconds
    ]
    last, step = scenarios[-1], found[-1]
    stop = f"falls below {_MIN_EFFICIENCY:.0%} at {stops[0]:,} ranks" if stops else f"stays above {_MIN_EFFICIENCY:.0%}"
    changes: dict[str, Scenario | None] = {
        "links of twice the rate": replace(last, link=last.link * 2) if last.link else None,
        "a batch of twice the size": replace(last, tokens=last.tokens * 2, micro_batches=last.micro_batches * 2),
    }
    for name in model.codecs:
        if name != last.compression.codec:
            changes[f"codec {name}"] = last.with_compression(codec=name)
    if model.inside and 1 < last.ranks_per_host < last.ranks and not last.compression.hierarchical:
        changes["compression.hierarchical"] = last.with_compression(hierarchical=True)
    speed = last.tokens / step.seconds
    gains = {
        name: scenario.tokens / forecast(model, scenario).seconds / speed - 1
        for name, scenario in changes.items()
        if scenario is not None
    }
    ranked = sorted(gains.items(), key=lambda each: -each[1])
    gains_text = ", ".join(f"{name} {gain:+.0%}" for name, gain in ranked[:4])
    sentences = [f"Efficiency {stop}.", f"At {last.ranks:,} ranks, tokens/s would change by: {gains_text}."]
    if not last.local_steps and last.ranks > 1:
        sentences += _advice_of_local_steps(model, last, speed)
    return sentences


def _advice_of_local_steps(model: PerformanceModel, scenario: Scenario, speed: float) -> list[str]:
    """With the codec that needs the fewest steps to hide, if they pay; `speed`: tokens/s of a rank without them."""
    names = sorted(model.codecs, key=lambda name: name != scenario.compression.codec)  # its own one first
    local = [
        scenario.with_compression(codec=name).with_local_steps(every="auto", fragments=_FRAGMENTS) for name in names
    ]
    best = min(local, key=lambda each: local_interval(model, each)[0])
    gain = best.tokens / forecast(model, best).seconds / speed - 1
    if gain < _WORTHWHILE:
        return []
    settings = f"codec {best.compression.codec}{_local_steps_of(model, best)}"
    return [f"Local steps change the training (docs/local-steps.md) and hide the exchange: {settings}: {gain:+.0%}."]


def _local_steps_of(model: PerformanceModel, scenario: Scenario) -> str:
    """Their settings in words, those that "auto" stands for; "" without."""
    if not scenario.local_steps or scenario.ranks == 1:
        return ""
    every, overlap = local_interval(model, scenario)
    fragments = scenario.local_steps.fragments
    return f" local_steps.every = {every}, fragments = {fragments}, overlap = {overlap}"


def _bucket_table(step: StepForecast, ranks: int) -> Table:
    """When buckets are ready, when their exchange starts and when it ends."""
    end = f"{step.schedule.backward_end * 1e3:,.1f}"
    title = f"buckets at {ranks:,} ranks, ms since the start of the backward pass, which ends at {end}"
    table = Table("bucket", "MB", "codec", "ready", "start", "end", title=title, title_justify="left")
    buckets = list(enumerate(step.schedule.buckets))
    half = _MAX_SHOWN_BUCKETS // 2
    shown = buckets if len(buckets) <= _MAX_SHOWN_BUCKETS else [*buckets[:half], *buckets[-half:]]
    for index, times_of_bucket in shown:
        times = (f"{seconds * 1e3:,.1f}" for seconds in times_of_bucket)
        table.add_row(str(index + 1), f"{step.elements[index] * 4 / 1e6:,.1f}", step.codecs[index], *times)
    return table
