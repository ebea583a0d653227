"""The start of engine horovod, beside an MPI and a Horovod that are fakes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from hvdlm.comm import horovod
from hvdlm.comm.horovod import HorovodCommunicator
from hvdlm.errors import HvdlmError


@pytest.mark.parametrize(
    ("has_nccl", "users_own", "expected"), [(False, None, "5"), (True, None, None), (False, "2", "2")]
)
def test_an_mpi4py_of_another_mpi(
    has_nccl: bool, users_own: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes each rank for the only one. By then Horovod has started, on CPUs with a cycle that is longer than its
    own default, unless the user has set it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    variables |= {} if users_own is None else {"HOROVOD_CYCLE_TIME": users_own}
    cycles = []
    hvd = SimpleNamespace(
        init=lambda: cycles.append(os.environ.get("HOROVOD_CYCLE_TIME")),
        rank=lambda: 1,
        size=lambda: 2,
        nccl_built=lambda: has_nccl,
        global_process_set=None,
    )
    monkeypatch.setattr(horovod, "hvd", hvd)
    monkeypatch.setattr(horovod, "start_mpi", lambda rank, timeout: SimpleNamespace(rank=0, size=1))
    said = "Horovod sees 2 ranks and takes itself for rank 1, mpi4py sees 1 and takes itself for rank 0: start"
    with patch.dict(os.environ, variables, clear=True), pytest.raises(HvdlmError, match=said):
        HorovodCommunicator.start(1, 10)
    assert cycles == [expected]
