"""Forecasts of layouts beside what others have measured and published.

    python benchmarks/published_runs.py

Of each source the first run gives what a GPU attains of its peak in matrix products, and the other runs are forecast by
it: hvdlm/scaling/published_runs.py has the runs, with where each figure stands. Nothing is computed on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.results import write_text
from common.script import RESULTS, absolute_path, run_script
from hvdlm.scaling.published_runs import Residual, residuals, spread

_HEAD = "| run | GPUs | layout | sequences at once | measured | forecast | residual |"
_RECOMPUTED = {"none": "", "half": ", half recomputed", "block": ", blocks recomputed", "whole": ", all recomputed"}


def page(found: list[Residual]) -> str:
    """Markdown: a table for each source, tokens/s of one GPU."""
    lines = ["# Forecasts of published runs", "", _lead(found)]
    for source in dict.fromkeys(each.run.source for each in found):
        rows = [each for each in found if each.run.source == source]
        where = f"{source.where}. {source.host_bits_per_second / 1e9:,.0f} Gbit/s a host of 8."
        share = f"The first run attains {rows[0].share:.1%} of the peak for bf16 in products."
        assumed = f" Not given there: {source.assumed}." if source.assumed else ""
        lines += ["", f"## {source.name}", "", f"{where} {share}{assumed}", "", _HEAD, "|---|---|---|---|---|---|---|"]
        lines += [_row(each) for each in rows]
    return "\n".join(lines) + "\n"


def _lead(found: list[Residual]) -> str:
    forecasts = [each for each in found if not each.is_fitted]
    within = sum(abs(each.error) <= 0.1 for each in forecasts)
    return (
        "Tokens per second of one GPU. The first run of each source gives what a GPU attains of its peak; of the other "
        f"{len(forecasts)}, {within} are forecast to 10%, and the root mean square error is {spread():.1%}."
    )


def _row(each: Residual) -> str:
    scenario = each.run.scenario
    residual = "fitted" if each.is_fitted else f"{each.error:+.1%}"
    cells = (
        *(each.run.name, f"{scenario.layout.ranks:,}", str(scenario.layout)),
        f"{scenario.micro_batch_size}{_RECOMPUTED[scenario.recomputed]}",
        *(f"{each.run.tokens_per_second:,.0f}", f"{each.predicted:,.0f}", residual),
    )
    return f"| {' | '.join(cells)} |"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=absolute_path, default=RESULTS, metavar="DIR", help="where the page goes")
    output: Path = parser.parse_args().output
    text = page(residuals())
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "published_runs.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_script("published_runs.py", _main)
