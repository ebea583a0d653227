"""A mesh of ranks: who is in which group. Expected members are written out by hand."""

from __future__ import annotations

from checks import check

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mesh import Mesh


@check(sizes=(4,))
def check_groups_of_four(comm: Communicator) -> None:
    """2 x 2: ranks 0 and 1 are neighbours in `tensor`, 0 and 2 in `pipeline`."""
    mesh = Mesh(comm, {"pipeline": 2, "data": 1, "shard": 1, "tensor": 2})
    tensor, pipeline = mesh["tensor"], mesh["pipeline"]
    assert tensor.all_gather_object(comm.rank) == ([0, 1] if comm.rank < 2 else [2, 3])
    assert pipeline.all_gather_object(comm.rank) == ([0, 2] if comm.rank % 2 == 0 else [1, 3])
    assert mesh["data"].size == mesh.group("data", "shard").size == 1
    assert mesh.group("tensor", "pipeline") is comm
    assert mesh["tensor"] is tensor
    assert [mesh.is_first(axis) for axis in ("tensor", "pipeline", "data")] == [comm.rank % 2 == 0, comm.rank < 2, True]
    assert tensor.is_inline and not pipeline.is_inline


@check(sizes=(4,))
def check_the_tensor_axis_has_a_communicator_of_its_own(comm: Communicator) -> None:
    """Also where it has all ranks: its collectives are not to wait for others."""
    mesh = Mesh(comm, {"pipeline": 1, "data": 1, "shard": 1, "tensor": 4})
    assert mesh["tensor"] is not comm and mesh["tensor"].is_inline and not comm.is_inline
    assert mesh["tensor"].all_gather_object(comm.rank) == [0, 1, 2, 3]
