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
