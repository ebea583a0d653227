"""What every engine must do at every size.

Expected values are worked out here from integers that add exactly in every dtype, without any collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from checks import CAPABILITIES, check

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8]
SHAPES = [(), (1,), (2,), (3,), (7,), (5, 3), (1000,), (0,), (4, 0)]
LONG_SHAPE = (300_001,)  # engine mpi sums such tensors in another way than short ones


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """Small integers, different on each rank: sums over 4 ranks stay below 64, exact even in bfloat16."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7 + salt) % 11) + rank).to(dtype).reshape(shape)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.equal(actual, expected), (actual, expected)


def reduced(size: int, shape: tuple[int, ...], dtype: torch.dtype, op: ReduceOp) -> torch.Tensor:
    stacked = torch.stack([values(rank, shape, torch.int64) for rank in range(size)])
    if op is ReduceOp.SUM:
        return stacked.sum(0).to(dtype)
    return stacked.amax(0).to(dtype)


def check_capabilities(comm: Communicator) -> None:
    """They are those by which the other checks were chosen."""
    assert comm.capabilities - {"cuda"} == CAPABILITIES[comm.engine]
    assert not comm.supports("no such capability")


def check_all_reduce(comm: Communicator) -> None:
    for dtype in DTYPES:
        for shape in [*SHAPES, LONG_SHAPE]:
            for op in ReduceOp:
                expected = reduced(comm.size, shape, dtype, op)
                tensor = values(comm.rank, shape, dtype)
                assert comm.all_reduce_(tensor, op) is tensor
                same(tensor, expected)
                tensor = values(comm.rank, shape, dtype)
                work = comm.all_reduce_async_(tensor, op)
                same(work.wait(), expected)
                same(work.wait(), expected)


def check_strides(comm: Communicator) -> None:
    """Transposed and strided tensors: in-place results land in the caller's memory, nothing beside it changes."""
    for dtype in DTYPES:
        expected = reduced(comm.size, (6, 4), dtype, ReduceOp.SUM)
        transposed = values(comm.rank, (6, 4), dtype).t().contiguous().t()
        assert not transposed.is_contiguous()
        same(comm.all_reduce_(transposed), expected)
        wide = values(comm.rank, (6, 8), dtype)
        untouched = wide[:, 1::2].clone()
        comm.all_reduce_(wide[:, ::2])
        same(wide[:, ::2], reduced(comm.size, (6, 8), dtype, ReduceOp.SUM)[:, ::2])
        same(wide[:, 1::2], untouched)
        column = values(comm.rank, (6, 4), dtype)[:, 1]
        same(comm.broadcast_(column, comm.size - 1), values(comm.size - 1, (6, 4), dtype)[:, 1])
        same(comm.all_gather(values(comm.rank, (6, 4), dtype).t())[0], values(0, (6, 4), dtype).t())
        scattered = comm.reduce_scatter(values(comm.rank, (6, 4), dtype).t())
        assert scattered.is_contiguous() and scattered.dtype == dtype


def check_reduce_scatter(comm: Communicator) -> None:
    for dtype in DTYPES:
        for count in (0, 1, 2, 3, 4, 5, 7, 12, 1001):
            for op in ReduceOp:
                whole = reduced(comm.size, (count,), dtype, op)
                # by hand: the first count % size ranks hold one element more
                small, larger = divmod(count, comm.size)
                start = comm.rank * small + min(comm.rank, larger)
                stop = start + small + (1 if comm.rank < larger else 0)
                source = values(comm.rank, (count,), dtype)
                part = comm.reduce_scatter_async(source, op).wait()
                same(part, whole[start:stop])
                same(source, values(comm.rank, (count,), dtype))


def check_equal_parts(comm: Communicator) -> None:
    """Into tensors of their own, which leaves `values` as they are, and into this rank's part of them."""
    for dtype in DTYPES:
        for count in (0, 1, 3, 70_000):
            own = slice(comm.rank * count, (comm.rank + 1) * count)
            for op in ReduceOp:
                expected = reduced(comm.size, (comm.size * count,), dtype, op)[own]
                source = values(comm.rank, (comm.size * count,), dtype)
                apart = torch.zeros(count, dtype=dtype)
                same(comm.reduce_scatter_into(apart, source, op), expected)
                same(source, values(comm.rank, (comm.size * count,), dtype))
                comm.reduce_scatter_into_async(source[own], source, op).wait()
                same(source[own], expected)
            everyone = torch.cat([values(rank, (count,), dtype) for rank in range(comm.size)])
            gathered = torch.zeros_like(everyone)
            same(comm.all_gather_into(gathered, values(comm.rank, (count,), dtype)), everyone)
            gathered = torch.zeros_like(everyone)
            gathered[own] = values(comm.rank, (count,), dtype)
            comm.all_gather_into_async(gathered, gathered[own]).wait()
            same(gathered, everyone)
    for part, whole in (
        (torch.zeros(2), torch.zeros(2 * comm.size + 1)),
        (torch.zeros(2, 1), torch.zeros(2, comm.size)),
    ):
        with pytest.raises(ValueError, match="1-D, contiguous"):
            comm.reduce_scatter_into(part, whole)


def check_all_gather(comm: Communicator) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            expected = torch.stack([values(rank, shape, dtype) for rank in range(comm.size)])
            same(comm.all_gather(values(comm.rank, shape, dtype)), expected)
            same(comm.all_gather_async(values(comm.rank, shape, dtype)).wait(), expected)
        for lengths in ([3, 0, 1, 5], [0, 0, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0], [300, 7, 0, 4]):
            rows = [(length, 3) for length in lengths[: comm.size]]
            expected_parts = [values(rank, shape, dtype) for rank, shape in enumerate(rows)]
            for known in (None, lengths[: comm.size]):
                parts = comm.all_gather_v(values(comm.rank, rows[comm.rank], dtype), known)
                assert len(parts) == comm.size
                for part, expected in zip(parts, expected_parts, strict=True):
                    same(part, expected)


def check_all_to_all(comm: Communicator) -> None:
    """Rank r sends `rows(r, s)` rows to rank s: as many to all, unequal, empty for some, and none at all."""
    layouts: list[Callable[[int, int], int]] = [
        lambda source, target: 3,
        lambda source, target: 1 + 2 * source + target,
        lambda source, target: source * target,  # rank 0 sends and receives nothing
        lambda source, target: 70_000 if source != target else 5,  # several messages on engine mpi
        lambda source, target: 2 * int(target == comm.size - 1),
        lambda source, target: 0,
    ]
    everyone = range(comm.size)
    kinds = [(torch.float32, rows, shape) for rows in layouts for shape in ((), (3,), (2, 0))]
    kinds += [(dtype, layouts[1], (3,)) for dtype in DTYPES]  # parts that begin anywhere
    for dtype, rows, row_shape in kinds:
        parts = [values(comm.rank, (rows(comm.rank, r), *row_shape), dtype, salt=r) for r in everyone]
        lengths = [rows(source, comm.rank) for source in everyone]
        for known in (None, lengths):
            received = comm.all_to_all_async(parts, known).wait()
            assert len(received) == comm.size
            for source, part in enumerate(received):
                same(part, values(source, (lengths[source], *row_shape), dtype, salt=comm.rank))
    # of no dimension, strided, and several under way
    scalars = [torch.tensor(10 * comm.rank + target) for target in everyone]
    assert [int(each) for each in comm.all_to_all(scalars)] == [10 * source + comm.rank for source in everyone]
    columns = values(comm.rank, (5, comm.size), torch.float32)
    works = [comm.all_to_all_async(list(columns.t()), [5] * comm.size) for _ in range(3)]
    for work in reversed(works):
        for source, part in enumerate(work.wait()):
            same(part, values(source, (5, comm.size), torch.float32)[:, comm.rank])


def check_broadcast(comm: Communicator) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            for root in range(comm.size):
                same(comm.broadcast_(values(comm.rank, shape, dtype), root), values(root, shape, dtype))
    special = torch.tensor([float("nan"), float("inf"), -0.0, 65504.0]).to(torch.bfloat16)
    received = comm.broadcast_(special if comm.rank == 0 else torch.zeros(4, dtype=torch.bfloat16), 0)
    same(received.view(torch.int16), special.view(torch.int16))


@check(sizes=[3], lacks="bfloat16")
def check_bfloat16_rounds_once(comm: Communicator) -> None:
    """256 + 1 + 1 is 258 in float32 and 256 if bfloat16 rounds after each addition: never silently wrong."""
    tensor = torch.tensor([256.0 if comm.rank == 0 else 1.0], dtype=torch.bfloat16)
    same(comm.all_reduce_(tensor), torch.tensor([258.0], dtype=torch.bfloat16))


def check_order_of_many(comm: Communicator) -> None:
    """Operations under way at once, waited for in another order than submitted."""
    tensors = [values(comm.rank, (200 + index,), torch.float32, salt=index) for index in range(20)]
    works = [comm.all_reduce_async_(tensor) for tensor in tensors]
    gathered = comm.all_gather_async(torch.tensor([comm.rank]))
    for index in reversed(range(20)):
        expected = sum(values(rank, (200 + index,), torch.float32, salt=index) for rank in range(comm.size))
        same(works[index].wait(), expected)
    same(gathered.wait().flatten(), torch.arange(comm.size))


@check(sizes=[2, 3, 4], needs="send")
def check_messages(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for dtype in DTYPES:
        for shape in ((3,), (5, 3), (0,), (70_000,)):
            sent = comm.send_async(values(comm.rank, shape, dtype), right)
            received = comm.receive_async_(torch.zeros(shape, dtype=dtype), left)
            same(received.wait(), values(left, shape, dtype))
            sent.wait()
    # in order, and into a strided tensor
    if comm.rank == 0:
        for index in range(5):
            comm.send(torch.full((4,), index), comm.size - 1)
    if comm.rank == comm.size - 1:
        for index in range(5):
            target = torch.zeros(8, dtype=torch.int64)
            comm.receive_(target[::2], 0)
            same(target, torch.tensor([index, 0] * 4))


def check_objects(comm: Communicator) -> None:
    for root in range(comm.size):
        value = {"rank": comm.rank, "text": "ä" * (comm.rank * 1000)}
        assert comm.broadcast_object(value, root) == {"rank": root, "text": "ä" * (root * 1000)}
    assert comm.all_gather_object("x" * comm.rank) == ["x" * rank for rank in range(comm.size)]
    assert comm.all_gather_object(None) == [None] * comm.size


def check_local_ranks(comm: Communicator) -> None:
    assert (comm.local_rank, comm.local_size, comm.node_rank, comm.node_count) == (comm.rank, comm.size, 0, 1)
    assert len(comm.hosts) == comm.size


def check_split(comm: Communicator) -> None:
    """Odd and even ranks, each group in falling order of rank."""
    group = comm.split(color=comm.rank % 2, key=-comm.rank)
    members = [rank for rank in reversed(range(comm.size)) if rank % 2 == comm.rank % 2]
    assert (group.size, group.rank) == (len(members), members.index(comm.rank))
    same(group.all_reduce_(torch.tensor([2**comm.rank])), torch.tensor([sum(2**rank for rank in members)]))
    assert group.all_gather_object(comm.rank) == members
    parts = group.all_gather_v(torch.full((comm.rank,), comm.rank, dtype=torch.uint8))
    assert [part.tolist() for part in parts] == [[rank] * rank for rank in members]
    assert group.broadcast_object(comm.rank, root=0) == members[0]
    scattered = group.reduce_scatter(torch.arange(len(members)) + 10)
    assert scattered.tolist() == [(group.rank + 10) * group.size]
    if group.supports("send") and group.size == 2:
        peer = 1 - group.rank
        sent = group.send_async(torch.tensor([comm.rank]), peer)
        assert group.receive_(torch.zeros(1, dtype=torch.int64), peer).item() == members[peer]
        sent.wait()
    swapped = group.all_to_all([torch.tensor([10 * comm.rank + member]) for member in members])
    assert [int(each) for each in swapped] == [10 * member + comm.rank for member in members]
    comm.barrier()
    again = comm.split(color=0, key=comm.rank)
    assert (again.size, again.rank) == (comm.size, comm.rank)
    assert again.all_gather_object(comm.rank) == list(range(comm.size))


@check(sizes=[2, 3, 4], needs="split")
def check_groups_of_ranks_that_have_made_unlike_numbers_of_groups(comm: Communicator) -> None:
    alone = comm.split(color=int(comm.rank > 0), key=comm.rank)
    if comm.rank == 0:
        for _ in range(3):
            alone.split(0, 0)
    for _ in range(2):
        group = comm.split(color=0, key=-comm.rank)
        assert group.all_gather_object(comm.rank) == list(reversed(range(comm.size)))


def check_closing_with_groups(comm: Communicator) -> None:
    """Groups of groups, some closed before: the rest are closed with the whole, and nothing else is."""
    own = comm.split(0, comm.rank)
    pairs = own.split(own.rank // 2, own.rank)
    odd = own.split(own.rank % 2, -own.rank)
    inner = odd.split(0, odd.rank)
    same(inner.all_reduce_(torch.ones(1)), torch.full((1,), float(odd.size)))
    pairs.close()
    own.close()
    own.close()
    same(comm.all_reduce_(torch.ones(2)), torch.full((2,), float(comm.size)))


@check(sizes=[2, 3, 4], engines=["horovod"])
def check_which_groups_are_of_horovod(comm: Communicator) -> None:
    """A group of all its ranks is; one of some of them is where Horovod has process sets."""
    everyone = comm.split(0, -comm.rank)
    assert everyone.engine == comm.engine
    same(everyone.all_reduce_(torch.ones(3)), torch.full((3,), float(comm.size)))
    has_sets = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") == "1"
    by_messages = "tcp" if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ else "mpi"
    part = comm.split(comm.rank % 2, comm.rank)
    assert part.engine == ("horovod" if has_sets and comm.size == int(os.environ["HOROVOD_SIZE"]) else by_messages)
    assert part.split(0, 0).all_gather_object(comm.rank) == list(range(comm.rank % 2, comm.size, 2))
    assert part.split(part.rank, 0).size == 1


@check(sizes=[2, 3, 4], needs="send")
def check_messages_of_groups_are_apart(comm: Communicator) -> None:
    """Groups of the same ranks, their collectives and messages of many sizes at once, none of them in step."""
    groups = [comm, comm.split(0, comm.rank), comm.split(0, -comm.rank)]
    works = []
    for index, group in enumerate(groups if comm.rank % 2 else groups[::-1]):
        number = index if comm.rank % 2 else len(groups) - 1 - index
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        for length in (3, 200_000, 1):
            target = torch.zeros(length)
            sent = torch.full((length,), 100.0 * number + group.rank)
            works.append((group.receive_async_(target, left), torch.full((length,), 100.0 * number + left)))
            works.append((group.send_async(sent, right), None))
            total = torch.full((length,), float(number))
            works.append((group.all_reduce_async_(total), torch.full((length,), float(number * group.size))))
    for work, expected in reversed(works):
        result = work.wait()
        if expected is not None:
            same(result, expected)


def check_mistakes(comm: Communicator) -> None:
    for mistake, error in (
        (lambda: comm.all_reduce_(torch.zeros(2, dtype=torch.complex64)), TypeError),
        (lambda: comm.broadcast_(torch.zeros(2), root=comm.size), ValueError),
        (lambda: comm.send(torch.zeros(2), comm.rank), ValueError),
        (lambda: comm.all_gather_v(torch.zeros(2), [5] * comm.size), ValueError),
        (lambda: comm.all_to_all([torch.zeros(2)] * (comm.size + 1)), ValueError),
        (lambda: comm.all_to_all([torch.zeros(2)] * comm.size, [5] * comm.size), ValueError),
        (lambda: comm.all_to_all([torch.zeros(2, 1 + rank) for rank in range(2)] * 2), ValueError),
    ):
        try:
            mistake()
        except error:
            continue
        raise AssertionError(f"{error} was not raised")
