"""What every engine, the ring, gradients and codecs must do, on ranks of a pool: every check an item of its own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import codecs_body
import communicator_body
import dion_body
import gradients_body
import layouts_body
import local_steps_body
import masked_body
import mesh_body
import mpi_body
import muon_body
import pipeline_body
import pipeline_training_body
import privacy_body
import pytest
import ring_body
import scoring_body
import server_body
import sharded_body
import sharded_memory_body
import sharded_steps_body
import tensor_body
import training_body
from checks import Case, Group, assert_every_check_runs, cases_of
from pool import Pools


def groups(
    engine: str, launcher: str, sizes: list[int], pool: int = 4, is_thorough: bool = False, **keywords: object
) -> list[Group]:
    """Groups of a pool."""
    pool_size = {"none": 1}.get(launcher, pool)
    return [Group(engine, launcher, n, pool_size, keywords, is_thorough) for n in sizes]


# Of Horovod's pools all ranks are Horovod's; parts are groups over our own TCP connections, or over MPI, unless Horovod
# has process sets.
GLOO, OVER_MPI = "horovodrun --gloo", "horovodrun --mpi"
WITH_PROCESS_SETS = "env HOROVOD_DYNAMIC_PROCESS_SETS=1 horovodrun --gloo"

# 1 and 3 ranks are no different from launcher to launcher: one of each engine tells
CASES = [
    *cases_of(
        communicator_body,
        [
            *groups("solo", "none", [1]),
            *groups("torch", "none", [1]),
            *groups("mpi", "mpirun", [1, 2, 3, 4]),
            *groups("torch", "mpirun", [2, 4], is_thorough=True),
            *groups("torch", "torchrun", [1, 2, 3, 4]),
            *groups("horovod", GLOO, [1, 2, 3], pool=3),
            *groups("horovod", WITH_PROCESS_SETS, [3, 4], is_thorough=True),
            *groups("horovod", OVER_MPI, [1], pool=1, is_thorough=True),
            *groups("horovod", OVER_MPI, [2], pool=2, is_thorough=True),
        ],
    ),
    *cases_of(
        sharded_body, [*groups("mpi", "mpirun", [1, 2, 3, 4]), *groups("torch", "mpirun", [2, 4], is_thorough=True)]
    ),
    *cases_of(sharded_steps_body, groups("mpi", "mpirun", [2, 3, 4])),
    *cases_of(sharded_memory_body, groups("mpi", "mpirun", [2, 4])),
    *cases_of(layouts_body, groups("mpi", "mpirun", [4])),
    *cases_of(mesh_body, [*groups("mpi", "mpirun", [4]), *groups("torch", "mpirun", [4], is_thorough=True)]),
    *cases_of(mpi_body, groups("mpi", "mpirun", [1, 2, 3])),
    *cases_of(
        ring_body,
        [
            *groups("solo", "none", [1]),
            *groups("mpi", "mpirun", [2, 3, 4]),
            *groups("torch", "mpirun", [3], is_thorough=True),
            *groups("horovod", GLOO, [3], pool=3),
            *groups("horovod", OVER_MPI, [2], pool=2, is_thorough=True),
        ],
    ),
    *cases_of(
        gradients_body,
        [
            *groups("solo", "none", [1], algorithm="engine"),
            *groups("mpi", "mpirun", [2, 4], algorithm="engine"),
            *groups("mpi", "mpirun", [2, 3, 4], algorithm="ring"),
            *groups("torch", "mpirun", [2], algorithm="engine", is_thorough=True),
            *groups("torch", "mpirun", [3], algorithm="ring", is_thorough=True),
            *groups("horovod", GLOO, [3], pool=3, algorithm="engine"),
            *groups("horovod", GLOO, [3], pool=3, algorithm="ring"),
            *groups("horovod", OVER_MPI, [2], pool=2, algorithm="engine", is_thorough=True),
            *groups("horovod", OVER_MPI, [2], pool=2, algorithm="ring", is_thorough=True),
        ],
    ),
    *cases_of(
        codecs_body,
        [
            *groups("mpi", "mpirun", [2, 4], algorithm="ring"),
            *groups("mpi", "mpirun", [2], algorithm="engine"),
            *groups("horovod", GLOO, [3], pool=3, algorithm="ring", is_thorough=True),
            *groups("horovod", OVER_MPI, [2], pool=2, algorithm="engine", is_thorough=True),
        ],
    ),
    *cases_of(
        server_body,
        [
            *groups("mpi", "mpirun", [1, 2, 3, 4]),
            *groups("torch", "torchrun", [2, 3]),
            *groups("horovod", GLOO, [3], pool=3),
        ],
    ),
    *cases_of(
        masked_body,
        [
            *groups("mpi", "mpirun", [1, 2, 3, 4]),
            *groups("torch", "torchrun", [3]),
            *groups("horovod", GLOO, [3], pool=3),
        ],
    ),
    *cases_of(training_body, groups("mpi", "mpirun", [1, 2, 3])),
    *cases_of(privacy_body, groups("mpi", "mpirun", [1, 2, 3])),
    *cases_of(local_steps_body, groups("mpi", "mpirun", [1, 2, 3, 4])),
    *cases_of(dion_body, groups("mpi", "mpirun", [1, 2, 3, 4])),
    *cases_of(
        scoring_body,
        [
            *groups("solo", "none", [1]),
            *groups("mpi", "mpirun", [2, 3]),
            *groups("torch", "torchrun", [2]),
            *groups("horovod", GLOO, [3], pool=3),
            *groups("horovod", OVER_MPI, [2], pool=2, is_thorough=True),
        ],
    ),
    *cases_of(
        pipeline_body,
        [
            *groups("mpi", "mpirun", [2, 4]),
            *groups("torch", "mpirun", [2, 4], recomputes=False, is_thorough=True),
            *groups("horovod", GLOO, [2], pool=3, recomputes=False),
            *groups("horovod", OVER_MPI, [2], pool=2, recomputes=False, is_thorough=True),
        ],
    ),
    *cases_of(pipeline_training_body, groups("mpi", "mpirun", [2, 4])),
    *cases_of(muon_body, [*groups("mpi", "mpirun", [1, 2, 3, 4]), *groups("torch", "mpirun", [2], is_thorough=True)]),
    *cases_of(tensor_body, [*groups("mpi", "mpirun", [2, 4]), *groups("torch", "mpirun", [2], is_thorough=True)]),
]

# One pool after the other, so that each starts once.
CASES.sort(key=lambda case: (case.group.engine, case.group.launcher, case.group.pool))


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """The ranks of one engine and launcher serve one worker of pytest-xdist."""
    group = pytest.mark.xdist_group(f"{case.group.engine} {case.group.launcher}")
    has = {"timing": case.is_timing, "thorough": case.is_thorough}
    timeout = pytest.mark.timeout(case.deadline + 60)
    return [group, timeout, *(getattr(pytest.mark, name) for name in has if has[name])]


PARAMETERS = [pytest.param(case, marks=marks(case), id=str(case)) for case in CASES]


@pytest.mark.parametrize("case", PARAMETERS)
def test_check(case: Case, pools: Pools) -> None:
    group = case.group
    pool = pools.get(group.engine, group.launcher, group.pool)
    pool.run(case.body, case.function, group.size, case.deadline, **case.keywords)


@pytest.mark.parametrize(
    "body",
    [
        *(communicator_body, ring_body, gradients_body, codecs_body, training_body, local_steps_body, dion_body),
        *(layouts_body, masked_body, mesh_body, muon_body, pipeline_body, pipeline_training_body, privacy_body),
        *(scoring_body, sharded_body, sharded_memory_body, sharded_steps_body, tensor_body),
    ],
)
def test_every_check_runs(body: ModuleType) -> None:
    assert_every_check_runs(body, CASES)


def test_every_body_is_here() -> None:
    """A body file that nobody imports would pass by not being run."""
    files = set(Path(communicator_body.__file__).parent.glob("*_body.py"))
    assert files == {case.body for case in CASES}
