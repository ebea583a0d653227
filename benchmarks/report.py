"""The report of a scaling study: one HTML page, its figures as PNG and SVG, and its tables as Markdown.

    python benchmarks/report.py benchmarks/results/scaling/fabric-weak

RESULTS is a directory of scaling.py; results of allreduce.py and convergence.py in it become figures too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.results import write_text
from common.script import absolute_path, run_script
from hvdlm.comm.rate import parse_rate, rate_text
from hvdlm.errors import HvdlmError
from hvdlm.report.page import Section, Table, html
from hvdlm.scaling.holdout import Holdout, hold_out
from hvdlm.scaling.point import Point, read_points
from scaling import figures
from scaling.efficiency import Summary, shortfall_of_auto, summarise
from scaling.markdown_page import markdown


def write_report(results: Path) -> None:
    """Writes report.html, report.md and the figures beside the points."""
    points = read_points(results)
    summaries = summarise(points)
    if not summaries:
        raise HvdlmError(f"{results} holds no valid point: in every one ranks ended with different models")
    holdouts = hold_out([summary.point for summary in summaries])
    sections = [
        _figure(results, "throughput", "Throughput", _THROUGHPUT, figures.throughput(summaries), _points(summaries)),
        _figure(results, "efficiency", "Efficiency", _EFFICIENCY, figures.efficiency(summaries)),
        _figure(results, "time-per-step", "Parts of a step", _PARTS, figures.time_per_step(summaries)),
    ]
    if shortfalls := shortfall_of_auto(summaries):
        sections.append(Section("Codec auto and the best fixed codec", _AUTO, table=_auto(shortfalls)))
    if holdouts:
        figure = figures.predictions(holdouts)
        sections.append(_figure(results, "predictions", "Prediction", _PREDICTION, figure, _holdouts(holdouts)))
    if sums := [_read(file) for file in sorted(results.glob("allreduce-*.json"))]:
        rates = [float(parse_rate(each["link"])) if each["link"] else None for each in sums]
        sections.append(_figure(results, "bus-bandwidth", "All-reduce", _SUMS, figures.bus_bandwidth(sums, rates)))
    if (results / "convergence.json").exists():
        runs = _read(results / "convergence.json")["runs"]
        sections.append(_figure(results, "loss", "Loss over time", _LOSS, figures.loss_over_time(runs)))
    sections.append(Section("What was run", _RUN, table=_settings(points)))
    title, lead = f"Scaling study {points[0].study}, {points[0].mode}", _lead(points)
    write_text(results / "report.html", html(title, lead, sections))
    write_text(results / "report.md", markdown(title, lead, sections))
    print(f"{results / 'report.html'}: {len(summaries)} of {len(points)} points are valid")


_THROUGHPUT = (
    "Tokens of a global batch over the seconds of a step on the slowest rank: mean over repetitions without the "
    "fastest and the slowest, with its 95% interval (Student's, winsorised variance). Dashed: ideal scaling from the "
    "fewest ranks."
)
_EFFICIENCY = (
    "Tokens/s per rank, over tokens/s per rank on the fewest ranks with codec none. In a weak study every rank has the "
    "same batch size, in a strong one all ranks together have it."
)
_PARTS = (
    "Milliseconds of a step, means over ranks: waiting for data, forward and backward pass, waiting for other ranks "
    "(exposed communication), optimizer."
)
_AUTO = "Tokens/s of codec auto, and of the fixed codec that was fastest at the same setting."
_PREDICTION = (
    "Milliseconds of a step at held-out points, as forecast by a fit to the other points, over what was measured. "
    "MAPE: mean absolute percentage error."
)
_SUMS = "Bus bandwidth as nccl-tests define it, from the median iteration of the slowest rank; float32."
_LOSS = "Validation loss of the first seed of convergence.py."
_RUN = "Settings that are equal at all points."


def _figure(
    results: Path, name: str, title: str, text: str, figure: figures.Figure, table: Table | None = None
) -> Section:
    return Section(title, text, figures.save(figure, results / name), table)


def _lead(points: Sequence[Point]) -> str:
    first = points[0]
    kinds = {"fabric": "emulated hosts on one machine", "local": "one machine"}
    simulated = first.simulated_tokens_per_second
    compute = f" Compute is simulated by sleeping, at {simulated:,g} tokens/s per rank." if simulated else ""
    counts = sorted({len(point.repetitions) for point in points})
    return (
        f"{len(points)} points of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} repetitions on "
        f"{kinds.get(first.place.kind, first.place.kind)}: {first.machine.cores} cores of {first.machine.cpu}, "
        f"{first.machine.gpu or 'no GPU'}; hvdlm {first.revision}, torch {first.versions['torch']}, "
        f"{first.versions['mpi']}, {first.date}.{compute}"
    )


def _points(summaries: Sequence[Summary]) -> Table:
    columns = ("codec", "ranks", "link", "tokens/s", "95% interval", "efficiency", "step ms", "exposed ms", "MB sent")
    rows = []
    for each in summaries:
        point, speed = each.point, each.tokens_per_second
        interval = "" if math.isinf(speed.low) else f"{speed.low:,.0f} to {speed.high:,.0f}"
        rows.append(
            (
                point.codec,
                str(point.ranks),
                _rate(point.place.link_bits_per_second),
                f"{speed.mean:,.0f}",
                interval,
                "" if each.efficiency is None else f"{each.efficiency:.1%}",
                f"{point.tokens_per_step / speed.mean * 1e3:,.1f}",
                f"{each.parts['exposed communication'] * 1e3:,.1f}",
                f"{point.repetitions[-1].wire_bytes / 1e6:,.2f}",
            )
        )
    return Table(columns, rows)


def _auto(shortfalls: Sequence[tuple[Summary, Summary, float]]) -> Table:
    columns = ("ranks", "link", "auto, tokens/s", "chosen", "best fixed codec", "its tokens/s", "auto is slower by")
    rows = [
        (
            str(auto.point.ranks),
            _rate(auto.point.place.link_bits_per_second),
            f"{auto.tokens_per_second.mean:,.0f}",
            ", ".join(dict.fromkeys(bucket.codec for bucket in auto.point.buckets)),
            best.point.codec,
            f"{best.tokens_per_second.mean:,.0f}",
            f"{share:+.1%}",
        )
        for auto, best, share in shortfalls
    ]
    return Table(columns, rows)


def _holdouts(holdouts: Sequence[Holdout]) -> Table:
    columns = ("", "ranks", "link", "codec", "measured ms", "predicted ms", "error")
    rows = []
    for holdout in holdouts:
        for each in holdout.residuals:
            seconds = (f"{each.measured * 1e3:,.1f}", f"{each.predicted * 1e3:,.1f}")
            rows.append((holdout.name, str(each.ranks), _rate(each.link), each.codec, *seconds, f"{each.error:+.1%}"))
        rows.append((holdout.name, "all", "", "", "", "MAPE", f"{holdout.mape:.1%}"))
    return Table(columns, rows)


def _settings(points: Sequence[Point]) -> Table:
    first = points[0]
    rows = [("started by", first.place.launcher), ("engine", first.engine), ("algorithm", first.algorithm)]
    rows += [
        (f"{section}.{name}", str(value)) for section, each in first.settings.items() for name, value in each.items()
    ]
    rows += list(first.place.environment.items())
    equal = [row for row in rows if row[0] not in ("compression.codec", "train.global_batch_size", "comm.bucket_mb")]
    return Table(("setting", "value"), equal)


def _rate(link: float | None) -> str:
    return "" if link is None else rate_text(int(link))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HvdlmError(f"{file} is not JSON: {error}") from None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=absolute_path, metavar="RESULTS", help="a directory of scaling.py")
    return parser.parse_args()


if __name__ == "__main__":
    run_script("report.py", lambda: write_report(_parse().results))
