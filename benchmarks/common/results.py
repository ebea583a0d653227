"""The files that a benchmark writes: JSON with every measurement, and tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError


def read_results(path: Path) -> dict[str, Any]:
    """The results in a JSON file, by set-up or model; empty if there is no file yet.

    Raises HvdlmError if the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{path} holds no results of this benchmark: {error}; give another --output") from None
    if not isinstance(results, dict):
        raise HvdlmError(f"{path} holds no results of this benchmark: give another --output")
    return results


def write_results(path: Path, results: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes JSON. Replaces the file whole or not at all."""
    write_text(path, json.dumps(results, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with a newline at its end."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def format_number(value: float | None, form: str, factor: float = 1.0) -> str:
    """`value` times `factor` by a format such as "{:.2f}"; empty for None."""
    return "" if value is None else form.format(value * factor)
