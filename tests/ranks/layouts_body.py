"""Checkpoints of any layout of ranks, read by any other."""

from __future__ import annotations

from checks import check
from layout_changes import all_changes
from many_layouts import LAYOUTS, RANKS

from hvdlm.comm.communicator import Communicator


@check(sizes=[RANKS], precision=["bf16"])
def check_any_layout_reads_any_other(comm: Communicator, precision: str) -> None:
    """Parameters, moments, step counts and averages bit for bit, residuals by their sum."""
    changes = list(all_changes(comm, precision))
    assert len(changes) == (len(LAYOUTS) ** 2 if comm.rank == 0 else 0)
    assert [change for change in changes if not change.is_equal] == []
    assert [change for change in changes if change.keeps_residuals and not change.residuals] == []
