"""Whether every layout of ranks reads what every other has saved, as a table.

    mpirun -np 4 --oversubscribe --bind-to none python benchmarks/any_to_any.py

The runs, and the comparison, are those of the test (tests/ranks/layout_changes.py): a model of two layers is trained
for two steps in each layout with codec int4, which keeps residuals. Writes any_to_any.md; exits with status 1 where a
checkpoint was not read as it was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "ranks"))

from many_layouts import LAYOUTS, RANKS, Change

from common.conditions import describe_run
from common.results import markdown_table, write_text
from common.script import RESULTS, absolute_path, run_script
from hvdlm.errors import HvdlmError
from hvdlm.training.job import job

_LEGEND = """\
Rows have saved, columns have read that and saved again, by the numbers of the rows. A cell compares the two
checkpoints:

- `=`: parameters, AdamW's moments, step counts and the moving average are equal, bit for bit, and residuals are those
  of each rank, or on other ranks the same in sum.
- `= p`: the same but for residuals. Ranks that hold a part of the model (tensor ranks, stages) have residuals of that
  part, which are no other layout's: what they had not delivered is left out.
- `no`: not equal.
"""


def page(changes: Sequence[Change], precision: str, conditions: dict[str, Any]) -> str:
    """Markdown."""
    found = {(change.saved_by, change.read_by): _cell(change) for change in changes}
    numbers = [str(number) for number in range(1, len(LAYOUTS) + 1)]
    rows = [
        [number, saved, _settings(saved), *(found.get((saved, read), "") for read in LAYOUTS)]
        for number, saved in zip(numbers, LAYOUTS, strict=True)
    ]
    equal = sum(change.is_equal for change in changes)
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    lines = [
        "# From any layout to any other",
        "",
        "Written by `mpirun -np 4 --oversubscribe --bind-to none python benchmarks/any_to_any.py`; "
        f"{conditions['date']}, {precision}, {versions}.",
        "",
        f"{equal} of {len(changes)} are equal.",
        "",
        _LEGEND,
    ]
    return "\n".join(lines) + "\n" + markdown_table(["", "layout", "ranks, `[parallel]`", *numbers], rows)


def _settings(layout: str) -> str:
    ranks, parallel = LAYOUTS[layout]
    return ", ".join([str(ranks), *(f"`{name} = {value}`" for name, value in parallel.items())])


def _cell(change: Change) -> str:
    if not change.is_equal or (change.keeps_residuals and not change.residuals):
        return "no"
    return "=" if change.residuals else "= p"


def run(options: argparse.Namespace) -> None:
    """Makes the page on rank 0. Collective. Raises HvdlmError if a checkpoint was not read as it was written."""
    from layout_changes import changes as changes_of  # which starts MPI

    with job("auto", 300, options.precision) as communicator:
        if communicator.size != RANKS:
            raise HvdlmError(f"start {RANKS} ranks, not {communicator.size}: mpirun -np {RANKS}")
        changes = list(changes_of(communicator, options.precision))
        wrong: list[str] = []
        if communicator.rank == 0:
            options.output.mkdir(parents=True, exist_ok=True)
            write_text(options.output / "any_to_any.md", page(changes, options.precision, describe_run()))
            wrong = [f"{each.read_by} after {each.saved_by}" for each in changes if _cell(each) == "no"]
        if wrong := communicator.broadcast_object(wrong):
            raise HvdlmError(f"not read as it was written: {', '.join(wrong)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    return parser.parse_args()


if __name__ == "__main__":
    run_script("any_to_any.py", lambda: run(_parse()))
