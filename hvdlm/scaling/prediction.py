"""`hvdlm fit` and `hvdlm predict`: what was measured, carried on to more ranks, other links and models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hvdlm.comm.rate import parse_rate
from hvdlm.config import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.scaling.fit import fit
from hvdlm.scaling.performance import PerformanceModel, StepForecast, forecast, read_model
from hvdlm.scaling.point import read_points, write_record
from hvdlm.scaling.scenario import Scenario, of_config
from hvdlm.scaling.validation import Holdout, hold_out, root_mean_square

# Beyond so many times the measured ranks, or rates of links, a forecast is an extrapolation.
_RANGE = 4

# Efficiency below which more ranks are not worth while.
_WORTHWHILE = 0.5

_SHOWN_BUCKETS = 12

_WIDTH = 140  # columns of a page that is not a terminal


def write_fit(results: Path, output: Path) -> None:
    """Fits all points of a study, prints what was held out and how far off it was, and writes the model."""
    points = [point for point in read_points(results) if point.is_valid]
    tries = hold_out(points)
    model = fit(points)
    unseen = [residual for holdout in tries for residual in holdout.residuals]
    which = "that were fitted"
    if unseen:
        model, which = model.model_copy(update={"residual": root_mean_square(unseen)}), "that were not fitted"
    console = _console()
    for holdout in tries:
        console.print(residual_table(holdout))
    for where, network in (("within a host", model.inside), ("between hosts", model.between)):
        if network:
            carried = f"{network.efficiency:.1%} of its rate"
            if network.bits_per_second is not None:
                carried = f"{network.bits_per_second / 1e9:,.2f} Gbit/s"
            console.print(f"{where} a link carries {carried}, with {network.latency * 1e6:,.0f} us a hop")
    console.print(
        f"{len(points)} points; forecasts of points {which} are off by {model.residual:.1%} (root mean square)"
    )
    write_record(output, model)


def residual_table(holdout: Holdout) -> Table:
    """Every residual of points that a fit has not seen."""
    title = f"{holdout.name}: MAPE {holdout.mape:.1%} over {len(holdout.residuals)} points"
    table = Table("ranks", "link", "codec", "measured, ms", "predicted, ms", "error", title=title, title_justify="left")
    for each in holdout.residuals:
        link = "" if each.link is None else f"{each.link / 1e6:,g} Mbit/s"
        seconds = (f"{each.measured * 1e3:,.1f}", f"{each.predicted * 1e3:,.1f}")
        table.add_row(str(each.ranks), link, each.codec, *seconds, f"{each.error:+.1%}")
    return table


def predict(
    file: Path,
    *,
    ranks: str,
    ranks_per_host: int | None,
    link: str | None,
    codecs: Sequence[str],
    preset: str | None,
    batch_size: int | None,
    rank_flops: float | None,
    overrides: Sequence[str],
) -> None:
    """Prints tokens/s, efficiency and exposed communication for each codec and number of ranks, and what would help.

    `ranks`: "8..2048" doubles, "8,12,16" lists. `rank_flops`: FLOP/s that a rank achieves, in place of the measured.
    Raises HvdlmError for what the fit does not know.
    """
    model = read_model(file)
    for option, value in (("--per-node", ranks_per_host), ("--rank-flops", rank_flops)):
        if value is not None and value <= 0:
            raise HvdlmError(f"{option} {value:g}: give a number above 0")
    if rank_flops is not None:
        model = with_flops(model, rank_flops)
    per_host = ranks_per_host or model.ranks_per_host
    rate = float(parse_rate(link)) if link else max((each for each in model.measured.links if each), default=None)
    counts = parse_counts(ranks)
    words = ["--model.preset", preset] if preset else []
    words += ["--compression.candidates", model.measured.candidates] if model.measured.candidates else []
    words += overrides
    if batch_size is not None:
        words += ["--train.global_batch_size", str(batch_size), "--train.micro_batch_size", str(batch_size)]
    config = load(None, words, PRESETS)
    vocab_size = config.model.vocab_size or 257
    console = _console()
    for codec in codecs or model.measured.codecs:
        compression = config.compression.model_copy(update={"codec": codec})
        chosen = config.model_copy(update={"compression": compression})
        scenarios = [of_config(chosen, vocab_size, count, per_host, rate) for count in counts]
        alone = forecast(model, of_config(chosen, vocab_size, 1, per_host, rate))
        found = [forecast(model, scenario) for scenario in scenarios]
        console.print(_table(model, codec, scenarios, found, alone))
        console.print(*_advice(model, scenarios, found, alone), sep="\n")
        console.print(_timeline(found[-1], counts[-1]))
    console.print(f"{counts[-1]:,} ranks take about {start_seconds(model, counts[-1]):,.0f} s to start.")


def with_flops(model: PerformanceModel, flops: float) -> PerformanceModel:
    """The same links and codecs, with ranks that compute at another speed."""
    old = 1 / (model.forward_seconds_per_flop + model.backward_seconds_per_flop)
    return model.model_copy(
        update={
            "forward_seconds_per_flop": model.forward_seconds_per_flop * old / flops,
            "backward_seconds_per_flop": model.backward_seconds_per_flop * old / flops,
        }
    )


def parse_counts(text: str) -> list[int]:
    """Numbers of ranks: "8..64" is 8, 16, 32, 64. Raises HvdlmError for anything else."""
    first, dots, last = text.partition("..")
    try:
        if not dots:
            counts = [int(each) for each in text.split(",")]
        else:
            counts = [int(first)]
            while counts[-1] * 2 <= int(last):
                counts.append(counts[-1] * 2)
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise HvdlmError(f"--ranks {text}: give numbers as in 8,16,32, or 8..2048, which doubles")
    return counts


def interval(model: PerformanceModel, ranks: int) -> float:
    """Half the width of a forecast's 95% interval, as a factor above 1.

    Twice the residual of points that were not fitted; once more for each doubling beyond the measured ranks, over which
    nothing is known of how the error grows.
    """
    doublings = max(0.0, math.log2(ranks / max(model.measured.ranks)))
    return math.exp(2 * model.residual * (1 + doublings))


def start_seconds(model: PerformanceModel, ranks: int) -> float:
    """From the start of processes to the first step."""
    more = max(0, ranks - min(model.measured.ranks))
    return model.start_seconds + model.start_seconds_per_rank * more


def is_extrapolated(model: PerformanceModel, ranks: int, link: float | None) -> bool:
    """Whether so many ranks, or links of such a rate, are far from what was measured."""
    known = [rate for rate in model.measured.links if rate is not None]
    is_far = link is not None and bool(known) and not min(known) / _RANGE <= link <= max(known) * _RANGE
    return is_far or ranks > _RANGE * max(model.measured.ranks)


def _console() -> Console:
    """As wide as the tables where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _table(
    model: PerformanceModel,
    codec: str,
    scenarios: Sequence[Scenario],
    found: Sequence[StepForecast],
    alone: StepForecast,
) -> Table:
    columns = ("ranks", "tokens/s", "95% interval", "efficiency", "step, ms", "exposed, ms", "sent a rank, MB", "")
    table = Table(*columns, title=f"codec {codec}", title_justify="left")
    for scenario, step in zip(scenarios, found, strict=True):
        speed = scenario.ranks * scenario.tokens / step.seconds
        factor = interval(model, scenario.ranks)
        table.add_row(
            f"{scenario.ranks:,}",
            f"{speed:,.0f}",
            f"{speed / factor:,.0f} to {speed * factor:,.0f}",
            f"{alone.seconds / step.seconds:.1%}",
            f"{step.seconds * 1e3:,.1f}",
            f"{step.exposed * 1e3:,.1f}",
            f"{step.wire_bytes / 1e6:,.2f}",
            "extrapolated" if is_extrapolated(model, scenario.ranks, scenario.link) else "",
        )
    return table


def _advice(
    model: PerformanceModel, scenarios: Sequence[Scenario], found: Sequence[StepForecast], alone: StepForecast
) -> list[str]:
    """Where it stops scaling, and what would help most at the most ranks."""
    stops = [
        each.ranks for each, step in zip(scenarios, found, strict=True) if alone.seconds < _WORTHWHILE * step.seconds
    ]
    last, step = scenarios[-1], found[-1]
    stop = f"falls below {_WORTHWHILE:.0%} at {stops[0]:,} ranks" if stops else f"stays above {_WORTHWHILE:.0%}"
    sentences = [f"Efficiency {stop}."]
    tries = {
        "links of twice the rate": replace(last, link=last.link * 2) if last.link else None,
        "a batch of twice the size": replace(last, tokens=last.tokens * 2, micro_batches=last.micro_batches * 2),
    }
    for name in model.codecs:
        if name != last.compression.codec:
            tries[f"codec {name}"] = last.with_compression(codec=name)
    if model.inside and 1 < last.ranks_per_host < last.ranks and not last.compression.hierarchical:
        tries["compression.hierarchical"] = last.with_compression(hierarchical=True)
    speed = last.tokens / step.seconds
    gains = {
        name: scenario.tokens / forecast(model, scenario).seconds / speed - 1
        for name, scenario in tries.items()
        if scenario is not None
    }
    ranked = sorted(gains.items(), key=lambda each: -each[1])
    told = ", ".join(f"{name} {gain:+.0%}" for name, gain in ranked[:4])
    return [*sentences, f"At {last.ranks:,} ranks, tokens/s would change by: {told}."]


def _timeline(step: StepForecast, ranks: int) -> Table:
    """When buckets are full and there."""
    end = f"{step.schedule.backward_end * 1e3:,.1f}"
    title = f"buckets at {ranks:,} ranks, ms since the beginning of the backward pass, which ends at {end}"
    table = Table("bucket", "MB", "codec", "full", "taken", "there", title=title, title_justify="left")
    journeys = list(enumerate(step.schedule.journeys))
    half = _SHOWN_BUCKETS // 2
    shown = journeys if len(journeys) <= _SHOWN_BUCKETS else [*journeys[:half], *journeys[-half:]]
    for index, journey in shown:
        times = (f"{at * 1e3:,.1f}" for at in journey)
        table.add_row(str(index + 1), f"{step.elements[index] * 4 / 1e6:,.1f}", step.codecs[index], *times)
    return table
