"""The table of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("", "tokens/s", "of limit", "of DDP", "exposed ms", "waited ms", "wire MB", "interface MB", "")


def table(results: Mapping[str, Any]) -> str:
    """Markdown: one table a set-up, under its name and what it ran on."""
    return "\n".join(_part(result) for result in results.values())


def _part(result: Mapping[str, Any]) -> str:
    setup, machine, versions, settings = (result[key] for key in ("setup", "machine", "versions", "settings"))
    where = f"one a host, links of {setup['rate']}" if setup["rate"] else "on one host"
    ran_on = (
        f"{setup['ranks']} ranks {where}, {machine['cores']} cores of {machine['cpu']}; "
        f"torch {versions['torch']}, {versions['mpi']}; "
        f"medians of {settings['rounds']} rounds of {settings['steps']} steps, {result['date']}."
    )
    rule = "|" + "---|" * len(_COLUMNS)
    rows = [_row(standing) for standing in result["standings"]]
    return "\n".join([f"## {setup['name']}", "", ran_on, "", _line(_COLUMNS), rule, *rows, ""])


def _row(standing: Mapping[str, Any]) -> str:
    starts, crashes = standing["starts"], standing["crashes"]
    return _line(
        [
            standing["name"],
            _number(standing["tokens_per_second"], 1, 0),
            _number(standing["of_limit"], 1, 3),
            _number(standing["of_ddp"], 1, 3),
            _number(standing["exposed_seconds"], 1e3, 1),
            _number(standing["waited_seconds"], 1e3, 1),
            _number(standing["wire_bytes"], 1e-6, 2),
            _number(standing["interface_bytes"], 1e-6, 2),
            f"crashed in {crashes} of {starts} starts" if crashes else "",
        ]
    )


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
