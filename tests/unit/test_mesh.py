"""How ranks are arranged in a mesh."""

from __future__ import annotations

import pytest

from hvdlm.comm.mesh import coordinates, mesh_shape
from hvdlm.config import ParallelSection
from hvdlm.errors import HvdlmError


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({}, 6, (1, 6, 1, 1)),
        ({"shard": 2}, 6, (1, 1, 6, 1)),
        ({"shard": 1, "data": 2}, 6, (1, 2, 3, 1)),
        ({"tensor": 2}, 6, (1, 3, 1, 2)),
        ({"pipeline": 2}, 2, (2, 1, 1, 1)),
        ({"pipeline": 2, "tensor": 2, "shard": 3}, 8, (2, 1, 2, 2)),
        ({"pipeline": 2, "tensor": 2, "data": 2}, 8, (2, 2, 1, 2)),
    ],
)
def test_every_rank_has_its_place(settings: dict[str, int], ranks: int, expected: tuple[int, ...]) -> None:
    shape = mesh_shape(ParallelSection(**settings), ranks)  # type: ignore[arg-type]
    assert tuple(shape[axis] for axis in ("pipeline", "data", "shard", "tensor")) == expected
    places = {tuple(coordinates(shape, rank).values()) for rank in range(ranks)}
    assert len(places) == ranks


@pytest.mark.parametrize(
    ("settings", "ranks", "counts"),
    [
        ({"tensor": 2}, 5, "start 4 or 6 ranks"),
        ({"tensor": 4}, 3, "start 4 ranks"),
        ({"pipeline": 2, "tensor": 2}, 6, "start 4 or 8 ranks"),
        ({"data": 3}, 4, "start 3 ranks"),
        ({"data": 2, "shard": 1}, 5, "start 4 or 6 ranks"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings: dict[str, int], ranks: int, counts: str) -> None:
    with pytest.raises(HvdlmError, match=counts):
        mesh_shape(ParallelSection(**settings), ranks)  # type: ignore[arg-type]


def test_neighbours_differ_in_the_innermost_axis() -> None:
    shape = mesh_shape(ParallelSection(pipeline=2, tensor=2, data=2), 8)
    assert [coordinates(shape, rank)["tensor"] for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [coordinates(shape, rank)["data"] for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [coordinates(shape, rank)["pipeline"] for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
