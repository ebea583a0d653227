"""Tensors of which ranks have parts: how these tile the whole, in memory and in files that ranks write together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blockwise import split_evenly
from hvdlm.strategies.held_parts import STEP, HeldParts
from hvdlm.strategies.sharded.partition import Partition, free, hold
from hvdlm.training import parts_file

SHAPES = {"scalar": (), "empty": (0, 3), "vector": (5,), "matrix": (7, 9), "alone": (1,)}
CPU = torch.device("cpu")


def partitions(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[Partition]:
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    return [Partition(parameters, CPU, torch.float32, rank, ranks, is_kept=True) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_pieces_tile_all_parameters(ranks: int) -> None:
    """Each number has one owner, as many for each but for what fills up the last parts; some own nothing."""
    shapes = {"a": (70, 33), "b": (5,), "c": (1,), "d": (64, 3)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    owners = partitions(shapes, ranks)
    found = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in shapes.items()}
    for owner in owners:
        assert len(owner.buffer) == ranks * len(owner.own_slot) and len(owner.own_slot) % 32 == 0
        for name in values:
            owner.load(name, values[name])
        for name, piece in owner.pieces.items():
            assert piece.stop > piece.start
            found[name][piece.start : piece.stop] += owner.master[piece.span]
    assert all(torch.equal(found[name], values[name].flatten()) for name in values)
    assert any(not owner.pieces for owner in owners) == (ranks == 64)


def test_memory_that_is_freed_and_held_again() -> None:
    """Views stay views of it."""
    (owner,) = partitions({"a": (4, 5), "b": (3,)}, 1)
    free(owner.buffer)
    assert owner.buffer.untyped_storage().size() == 0
    hold(owner.buffer)
    owner.buffer.fill_(2)
    owner.fill_up_(owner.buffer)
    assert all((slot == 2).all() for slot in owner.slots) and owner.buffer.sum() == 2 * 23
    hold(owner.buffer)
    assert owner.buffer.sum() == 2 * 23  # what has memory keeps it


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_blocks_of_equal_parts(count: int) -> None:
    """Every number of a parameter is in one block or one dense index, of the part that it lies in; none goes beyond."""
    bucket: Bucket = partitions({"a": (80, 97), "b": (80,), "c": (71, 80), "d": (3, 7)}, count)[0]
    used = sum(parameter.numel() for parameter in bucket.parameters)
    length = len(bucket.buffer) // count
    times = torch.zeros(len(bucket.buffer))
    for owner, part in enumerate(split_evenly(bucket, 256, count)):
        for start, stop, block in part.runs():
            times[start:stop] += 1
            assert 0 < block <= 256 and (stop - start) % block == 0
            assert owner * length <= start < stop <= (owner + 1) * length
        times[part.dense] += 1
        assert ((part.dense >= owner * length) & (part.dense < (owner + 1) * length)).all()
    assert (times[:used] == 1).all() and not times[used:].any()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_file_that_ranks_write_together(ranks: int, tmp_path: Path) -> None:
    """The library reads what it would have written, also of tensors that have no numbers."""
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    file = tmp_path / "parts.safetensors"
    parts_file.create(file, SHAPES)
    for rank in reversed(range(ranks)):
        parts = {}
        for name, value in values.items():
            flat = value.reshape(-1)
            # every `ranks`-th number: several runs
            runs = [(at, at + 1) for at in range(rank, len(flat), ranks)]
            parts[name] = runs, flat[rank::ranks].clone()
        parts_file.write(file, parts)
    read = load_file(file)
    assert read.keys() == values.keys()
    assert all(read[name].shape == values[name].shape and torch.equal(read[name], values[name]) for name in values)
    taken = torch.zeros(4)
    parts_file.take(values["matrix"], [(1, 3), (60, 62)], taken)
    assert torch.equal(taken, values["matrix"].flatten()[[1, 2, 60, 61]])


def test_files_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        parts_file.create(tmp_path / "nowhere" / "file", {"a": (3,)})
    with pytest.raises(OSError):
        parts_file.write(tmp_path / "nothing", {})


def test_who_saves_what() -> None:
    """A piece is saved by the rank that has it, a step count by the one that has the first number, of one copy."""
    shapes = {"a": (4, 4), "b": (3,), "c": (2,)}
    kinds = {"a": ("exp_avg", STEP), "b": ("exp_avg", STEP), "c": ("momentum",)}
    first = HeldParts(shapes, {"a": [(0, 10)], "c": [(0, 2)]}, kinds, frozenset("ac"))
    second = HeldParts(shapes, {"a": [(10, 16)], "b": [(0, 3)]}, kinds, frozenset("ab")).with_kind("ema")
    copy = HeldParts(shapes, {"a": [(0, 10)], "c": [(0, 2)]}, kinds, frozenset())
    state = {"exp_avg.a": (4, 4), "step.a": (), "exp_avg.b": (3,), "step.b": (), "momentum.c": (2,)}
    assert first.state_shapes() == state
    names = [*shapes, *state]
    assert {name for name in names if first.saves(name)} == {"a", "c", "exp_avg.a", "momentum.c", "step.a"}
    assert {name for name in names if second.saves(name)} == {"a", "b", "exp_avg.a", "exp_avg.b", "step.b"}
    assert second.saves("ema.a") and second.state_shapes()["ema.b"] == (3,)
    assert not any(copy.saves(name) for name in names)
    assert second.runs_of("exp_avg.a") == [(10, 16)] and second.runs_of("step.a") == [(0, 1)]
    assert list(second.runs_of("c")) == list(second.runs_of("momentum.c")) == []
