"""Checkpoints of any layout of ranks, read by any other."""

from __future__ import annotations

from checks import check
from layout_changes import all_changes
from many_layouts import LAYOUTS, OF_MUON, RANKS

from hvdlm.comm.communicator import Communicator


@check(sizes=[RANKS], algorithm=["adamw", "muon"])
def check_any_layout_reads_any_other(comm: Communicator, algorithm: str) -> None:
    """Parameters, moments, step counts and averages bit for bit, residuals by their sum."""
    changes = list(all_changes(comm, "bf16", algorithm))
    layouts = LAYOUTS if algorithm == "adamw" else OF_MUON
    assert len(changes) == (len(layouts) ** 2 if comm.rank == 0 else 0)
    assert [change for change in changes if not change.is_equal] == []
    assert [change for change in changes if change.keeps_residuals and not change.residuals] == []
