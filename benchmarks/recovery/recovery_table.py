"""The table of recovery.py, and what it takes from the trials."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from common.results import format_number, markdown_table
from recovery.step_lines import LoggedStep


def worst_loss_difference(steps: Mapping[int, LoggedStep], others: Mapping[int, LoggedStep]) -> float:
    """The largest relative difference between the losses of one step, of those that are known of both."""
    pairs = [(steps[step].loss, others[step].loss) for step in steps.keys() & others.keys()]
    return max((abs(one / other - 1) for one, other in pairs if one is not None and other is not None), default=0.0)


def table(results: dict[str, Any]) -> str:
    """Markdown of what is in recovery.json."""
    rows = [_row(setup, name, found["systems"]) for setup, found in results.items() for name in found["systems"]]
    columns = (
        *("set-up", "system", "trials", "failed", "step, s", "median, s", "worst, s", "of elastic"),
        *("repeated, s", "samples repeated", "samples lost", "loss", "end, s"),
    )
    return markdown_table(columns, rows)


def _row(setup: str, name: str, systems: dict[str, Any]) -> list[str]:
    found = systems[name]
    trials, failures = found["trials"], found["failures"]
    first = [setup, name, str(len(trials) + len(failures)), str(len(failures)), f"{found['step_seconds']:.2f}"]
    if not trials:
        return [*first, *[""] * 8]
    median = _median_seconds(found)
    elastic = _median_seconds(systems["elastic"]) if "elastic" in systems else None
    differences = [trial["worst_loss_difference"] for trial in trials]
    return [
        *first,
        f"{median:.2f}",
        f"{max(trial['seconds'] for trial in trials):.2f}",
        format_number(elastic and median / elastic, "{:.1f}"),
        *(
            f"{statistics.mean(trial[column] for trial in trials):.{digits}f}"
            for column, digits in (("seconds_repeated", 2), ("samples_repeated", 0), ("samples_lost", 0))
        ),
        "" if None in differences else f"{max(differences):.0e}",
        f"{max(trial['seconds_to_end'] for trial in trials):.1f}",
    ]


def _median_seconds(found: dict[str, Any]) -> float | None:
    """From a death to the end of a step; None if all trials have failed."""
    return statistics.median(trial["seconds"] for trial in found["trials"]) if found["trials"] else None
