"""Checkpoints of any layout of ranks, read by any other."""

from __future__ import annotations

from checks import check
from layout_changes import changes
from many_layouts import LAYOUTS, OF_MUON, RANKS

from hvdlm.comm.communicator import Communicator


@check(sizes=[RANKS], algorithm=["adamw", "muon"])
def check_each_layout_reads_two(comm: Communicator, algorithm: str) -> None:
    """Its own state and another: parameters, moments, steps and averages bit for bit, residuals by their sum."""
    assert_kept(comm, algorithm, readings=2)


@check(sizes=[RANKS], is_thorough=True, deadline=900, algorithm=["adamw", "muon"])
def check_any_layout_reads_any_other(comm: Communicator, algorithm: str) -> None:
    assert_kept(comm, algorithm, readings=len(layouts_of(algorithm)))


def layouts_of(algorithm: str) -> list[str]:
    return list(LAYOUTS if algorithm == "adamw" else OF_MUON)


def assert_kept(comm: Communicator, algorithm: str, readings: int) -> None:
    """Whatever a layout reads, it saves again."""
    found = list(changes(comm, "bf16", algorithm, readings))
    assert len(found) == (len(layouts_of(algorithm)) * readings if comm.rank == 0 else 0)
    assert [change for change in found if not change.is_equal] == []
    assert [change for change in found if change.keeps_residuals and not change.residuals] == []
