"""How many threads a rank computes with: its share of the cores, by affinity and CPU quota."""

from __future__ import annotations

import os

import pytest

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.training import hardware
from hvdlm.training.hardware import share_cores


@pytest.mark.parametrize(
    ("usable", "bound_alike", "local_size", "expected"),
    [
        (8, 2, 2, 4),  # both ranks of a host may use its 8 cores
        (8, 1, 2, 8),  # each is bound to 8 of its own
        (2, 2, 2, 1),  # a quota of two cores
        (4, 1, 2, 2),  # a quota of four, although each is bound to cores of its own
        (1, 2, 2, 1),
    ],
)
def test_threads_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, usable: int, bound_alike: int, local_size: int, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(hardware, "usable_cores", lambda: usable)
    monkeypatch.setattr(hardware.torch, "set_num_threads", lambda _: None)
    communicator = SoloCommunicator()
    communicator.local_size = local_size
    monkeypatch.setattr(communicator, "all_gather_object", lambda own: [own] * bound_alike)
    assert share_cores(0, communicator) == expected
