"""Buckets: gradients lie in them, in reverse order, and none is split; timestamps."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from hvdlm.gradients.bucket import GradientBucket, make_buckets
from hvdlm.timing import Timestamp


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((size,), float(index))) for index, size in enumerate(sizes)]


def named(given: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {f"parameter {index}": parameter for index, parameter in enumerate(given)}


def sizes(buckets: list[GradientBucket]) -> list[list[int]]:
    return [[parameter.numel() for parameter in bucket.parameters] for bucket in buckets]


@pytest.mark.parametrize(
    ("given", "floats", "expected"),
    [
        ([1, 2, 3], 100, [[3, 2, 1]]),
        ([1, 2, 3], 3, [[3], [2, 1]]),  # exactly full
        ([1, 2, 3], 2, [[3], [2], [1]]),  # the 3 is larger than a bucket
        ([5, 1, 1, 9, 1, 1], 4, [[1, 1], [9], [1, 1], [5]]),
        ([4, 4, 4], 7, [[4], [4], [4]]),
        ([], 4, []),
    ],
)
def test_buckets_are_filled_in_reverse_order(given: list[int], floats: int, expected: list[list[int]]) -> None:
    assert sizes(make_buckets(named(parameters(*given)), floats * 4)) == expected


def test_what_is_not_trained_is_left_out() -> None:
    given = parameters(1, 2, 3)
    given[1].requires_grad_(False)
    assert sizes(make_buckets(named(given), 400)) == [[3, 1]]
    assert given[1].grad is None
    for parameter in given:
        parameter.requires_grad_(False)
    assert make_buckets(named(given), 400) == []


def test_gradients_are_views_that_fill_the_buffer_without_gaps() -> None:
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    bucket = GradientBucket({"a": a, "b": b})
    assert (bucket.buffer.shape, bucket.buffer.dtype, bucket.nbytes()) == ((10,), torch.float32, 40)
    assert not bucket.buffer.any()
    bucket.buffer.copy_(torch.arange(10.0))
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b.grad.tolist() == [6, 7, 8, 9]
    other = torch.arange(10.0, 20.0)
    assert bucket.names == ["a", "b"]
    assert [piece.tolist() for piece in bucket.split(other)] == [[[10, 11, 12], [13, 14, 15]], [16, 17, 18, 19]]


def test_the_backward_pass_writes_into_the_buffer() -> None:
    a, b = nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    bucket = GradientBucket({"a": a, "b": b})
    address = bucket.buffer.data_ptr()
    for _ in range(2):  # a second micro-batch is added
        (a * b).sum().backward()
    assert bucket.buffer.tolist() == [6.0, 8.0, 2.0, 4.0]  # 2 b, then 2 a
    assert bucket.buffer.data_ptr() == address
    assert bucket.owns_gradients()


def test_a_step_begins_without_gradients_and_each_is_stored_once() -> None:
    a, b, c = (nn.Parameter(torch.tensor([value])) for value in (2.0, 3.0, 5.0))
    bucket = GradientBucket({"a": a, "b": b, "c": c})
    bucket.buffer.fill_(torch.nan)  # of the step before
    bucket.zero_grad()
    assert [each.grad for each in (a, b, c)] == [None] * 3
    for _ in range(2):
        (a * b).sum().backward()
        bucket.store(0)
        bucket.store(1)
    bucket.fill_missing()  # nothing has made one of c
    assert bucket.buffer.tolist() == [6.0, 4.0, 0.0]
    assert bucket.owns_gradients()
    bucket.zero_grad()
    a.grad = torch.tensor([7.0])  # by hand
    bucket.fill_missing()
    assert bucket.buffer.tolist() == [7.0, 0.0, 0.0]
    bucket.zero_grad()
    (a * b).sum().backward()
    bucket.store(0)
    a.grad = None  # after it was made
    bucket.fill_missing()
    assert not bucket.owns_gradients()


def test_an_optimizer_step_reads_the_buffer() -> None:
    a = nn.Parameter(torch.tensor([1.0, 2.0]))
    bucket = GradientBucket({"a": a})
    bucket.buffer.copy_(torch.tensor([8.0, 16.0]))
    torch.optim.SGD([a], lr=0.125).step()
    assert a.tolist() == [0.0, 0.0]


def test_it_notices_a_gradient_that_is_not_in_its_slot() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    bucket = GradientBucket(dict(module.named_parameters()))
    assert bucket.owns_gradients()
    module.zero_grad(set_to_none=False)
    assert bucket.owns_gradients()
    module[0].bias.grad = torch.zeros(2)
    assert not bucket.owns_gradients()

    bucket = GradientBucket(dict(module.named_parameters()))
    module.zero_grad()  # sets them to None
    assert not bucket.owns_gradients()


def test_the_difference_of_timestamps_is_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    earlier, later = Timestamp(torch.device("cpu")), Timestamp(torch.device("cpu"))
    assert later - earlier == 2.5
