"""The start of engine horovod, beside an MPI and a Horovod that are fakes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from hvdlm.comm import horovod
from hvdlm.comm.horovod import HorovodCommunicator
from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError
from hvdlm.gradients.channel import may_sum_by_engine


@pytest.mark.parametrize(
    ("has_nccl", "engine_sums", "users_own", "expected"),
    [
        (False, True, None, "5"),
        (False, False, None, "100"),
        (True, True, None, None),
        (True, False, None, None),
        (False, True, "2", "2"),
        (False, False, "2", "2"),
    ],
)
def test_an_mpi4py_of_another_mpi(
    has_nccl: bool, engine_sums: bool, users_own: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes each rank for the only one. By then Horovod has started, on CPUs with a cycle that is longer than its
    own default, the longer where it sums no gradients, unless the user has set it."""
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
        HorovodCommunicator.start(1, 10, engine_sums)
    assert cycles == [expected]


@pytest.mark.parametrize(
    ("comm", "compression", "expected"),
    [
        ({}, {}, True),
        ({}, {"codec": "fp16"}, True),
        ({}, {"codec": "auto"}, True),
        ({}, {"codec": "own.py:Codec"}, True),
        ({}, {"codec": "int4"}, False),
        ({}, {"codec": "powersgd"}, False),
        ({}, {"codec": "int4", "hierarchical": True}, True),
        ({"algorithm": "ring"}, {}, False),
        ({"algorithm": "engine"}, {"codec": "int4"}, True),
    ],
)
def test_when_gradients_may_be_left_to_the_engine(
    comm: dict[str, object], compression: dict[str, object], expected: bool
) -> None:
    sections = CommSection.model_validate(comm), CompressionSection.model_validate(compression)
    assert may_sum_by_engine(*sections) is expected
