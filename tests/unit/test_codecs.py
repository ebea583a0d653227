"""Lossy codecs on ranks that are threads: what is delivered, what stays in the residual, what NaN does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from thread_rank import on_threads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hvdlm.comm.communicator import Communicator
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs import blockwise, cast, integer, low_rank, powersgd, topk
from hvdlm.gradients.codecs import codec as codec_module
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.low_rank import (
    Matrices,
    multiply,
    multiply_factors,
    multiply_factors_with_torch,
    multiply_transposed,
    multiply_transposed_with_torch,
    multiply_with_torch,
    orthonormalise,
    orthonormalise_with_torch,
    reconstruct,
    reconstruct_with_torch,
)
from hvdlm.gradients.codecs.registry import CODECS

T = TypeVar("T")

# Matrices whose last blocks are shorter, with more columns than rows and the reverse; tensors that are sent dense.
SHAPES = {"a": (70, 83), "a bias": (70,), "b": (64, 129), "small": (20, 20), "c": (130, 66), "cube": (20, 20, 11)}
LENGTH = sum(math.prod(shape) for shape in SHAPES.values())


class ThreadExchange:
    """What codecs use of an Exchange; sums in the order of ranks. It notes the bytes of each message it is given."""

    has_ring = False

    def __init__(self, communicator: Communicator) -> None:
        self.rank, self.size = communicator.rank, communicator.size
        self.messages: list[int] = []
        self._communicator = communicator

    def all_reduce_(self, values: Tensor) -> None:
        values.copy_(sum(self.all_gather(values)))

    def all_gather(self, message: Tensor) -> list[Tensor]:
        self.messages.append(message.nbytes)
        return self._communicator.all_gather_object(message.clone())

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        assert len({len(message) for message in messages}) == 1
        self.messages.append(messages[0].nbytes)
        everyone = self._communicator.all_gather_object([message.clone() for message in messages])
        return [row[self.rank] for row in everyone]


def make_bucket() -> Bucket:
    return Bucket({name: nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()})


def make_codec(name: str, **settings: object) -> Codec:
    return CODECS[name](make_bucket(), CompressionSection(codec=name, **settings))


def on_ranks(size: int, name: str, body: Callable[[Codec, ThreadExchange], T], **settings: object) -> list[T]:
    """What `body` returns on each rank, which has a codec and an exchange."""
    return on_threads(size, lambda comm: body(make_codec(name, **settings), ThreadExchange(comm)))


def drawn(rank: int, step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(LENGTH, generator=generator) * scale


LOSSY = pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"density": 0.02}),
        ("topk", {"density": 0.3}),
        ("powersgd", {"matrix_rank": 3}),
        ("int8", {}),
        ("int4", {}),
        ("int2", {}),
        ("topk2", {"density": 0.02}),
        ("topk2", {"density": 0.3}),
    ],
)


@LOSSY
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_delivered_plus_residuals_are_all_gradients(name: str, settings: dict[str, object], size: int) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[list[Tensor], Tensor]:
        delivered = []
        for step in range(4):
            gradients = drawn(exchange.rank, step)
            codec.reduce_(gradients, exchange, step)
            delivered.append(gradients)
        return delivered, codec.state()["residual"]

    results = on_ranks(size, name, body, **settings)
    first = results[0][0]
    assert all(torch.equal(a, b) for delivered, _ in results for a, b in zip(delivered, first, strict=True))
    residual_sum = sum(residual.double() for _, residual in results)
    made = sum(drawn(rank, step).double() for rank in range(size) for step in range(4))
    assert (sum(each.double() for each in first) + residual_sum - made).abs().max() <= 1e-5
    assert residual_sum.abs().max() > 0.01  # it is lossy
    bucket = make_bucket()
    sums = bucket.split(sum(drawn(rank, 0) for rank in range(size)))
    for name_, expected, actual in zip(bucket.names, sums, bucket.split(first[0]), strict=True):
        if name_ in ("a bias", "small") or (name == "powersgd" and name_ == "cube"):
            assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6), name_


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-36, 1e-8, 1.0, 1e8, 1e36])
def test_one_rank_loses_no_bit_by_topk(magnitude: float) -> None:
    (codec,) = on_ranks(1, "topk", lambda codec, _: codec, density=0.05)
    gradients = drawn(0, 0) * torch.logspace(-6, 0, LENGTH) * magnitude
    residual_sum = codec.state()["residual"].copy_(drawn(0, 1, magnitude)).clone()
    intended = gradients + residual_sum

    def body(_: Codec, exchange: ThreadExchange) -> None:
        codec.reduce_(gradients, exchange, 0)

    on_ranks(1, "topk", body)
    assert gradients.isfinite().all()
    assert torch.equal(gradients + codec.state()["residual"], intended)
    if magnitude > 1e-45:  # which is too small for fp16, whatever the scale
        assert 0.02 < gradients.count_nonzero() / LENGTH < 0.1


@pytest.mark.parametrize("size", [2, 4])
def test_density_one_is_the_dense_sum(size: int) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        gradients = drawn(exchange.rank, 0)
        codec.reduce_(gradients, exchange, 0)
        return gradients, codec.state()["residual"]

    for delivered, residual in on_ranks(size, "topk", body, density=1.0):
        assert torch.equal(delivered, sum(drawn(rank, 0) for rank in range(size)))
        assert not residual.any()


@pytest.mark.parametrize("size", [2, 5])
def test_owners_keep_what_the_second_choice_drops(size: int) -> None:
    """Each rank's gradient is large at indices of its own, so among more than three ranks most sums are dropped."""

    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        gradients = torch.zeros(LENGTH)
        gradients[exchange.rank :: 50] = 1.0 + exchange.rank
        codec.reduce_(gradients, exchange, 0)
        return codec.bucket.split(gradients)[0].flatten(), codec.bucket.split(codec.state()["residual"])[0].flatten()

    results = on_ranks(size, "topk", body, density=0.02)  # 5 of 250: all that a rank has in a whole block
    for delivered, residual in results:
        for rank in range(size):
            if size == 2 or rank == size - 1:
                assert (delivered[rank:5750:50] == 1.0 + rank).all()
            else:
                assert not delivered[rank:5750:50].any()
        if size == 2:
            assert not residual[:5750].any()
    residual_sum = sum(residual for _, residual in results)[:5750]
    for rank in range(size):
        assert (residual_sum[rank::50] == (0.0 if size == 2 or rank == size - 1 else 1.0 + rank)).all()


@LOSSY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("size", "place"), [(1, 0), (2, 100), (2, 5820), (5, 7000), (5, 14090)])
def test_what_is_not_finite_reaches_all_and_is_owed_by_none(
    name: str, settings: dict[str, object], bad: float, size: int, place: int
) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codec.reduce_(drawn(exchange.rank, 0), exchange, 0)
        before = codec.state()["residual"].clone()
        gradients = drawn(exchange.rank, 1)
        if exchange.rank == size - 1:
            gradients[place] = bad
        codec.reduce_(gradients, exchange, 1)
        after = codec.state()["residual"].clone()
        healed = drawn(exchange.rank, 2)
        codec.reduce_(healed, exchange, 2)
        return gradients, before, after, healed

    for delivered, before, after, healed in on_ranks(size, name, body, **settings):
        assert not delivered.isfinite().any()
        assert torch.equal(before, after)
        assert healed.isfinite().all()


class NothingIsRead(TorchDispatchMode):
    """Fails where a number of a gradient is read, for which the host would wait for a GPU. Sizes, int64, lie there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_read = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64
        assert not is_read, "a number of a tensor was read"
        return func(*args, **(kwargs or {}))


ALL = [
    *LOSSY.args[1],
    ("none", {}),
    ("fp16", {}),
    ("bf16", {}),
    ("topk", {"warmup_steps": 1}),
    ("powersgd", {"warmup_steps": 1}),
]


@pytest.mark.parametrize(("name", "settings"), ALL)
@pytest.mark.parametrize("size", [1, 4])
def test_elsewhere_than_on_a_cpu_the_same_without_reading_a_number(
    name: str, settings: dict[str, object], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's operations beside the loops: three steps, of which the second is not finite."""
    is_by_loops = True

    def body(codec: Codec, exchange: ThreadExchange) -> list[Tensor]:
        after = []
        for step in range(4):
            gradients = drawn(exchange.rank, step)
            if step == 2 and exchange.rank == size - 1:
                gradients[100] = math.nan
            with nullcontext() if is_by_loops else NothingIsRead():
                codec.reduce_(gradients, exchange, step)
            after += [gradients, *(tensor.clone() for tensor in {**codec.state(), **codec.extra_state()}.values())]
        return after

    by_loops = on_ranks(size, name, body, **settings)
    is_by_loops = False
    for module in (blockwise, cast, codec_module, integer, low_rank, powersgd, topk):
        monkeypatch.setattr(module, "uses_loops", lambda _: False)
    by_torch = on_ranks(size, name, body, **settings)
    tolerance = 1e-4 if name == "powersgd" else 0.0  # whose sums have another order
    for one, other in zip(by_loops, by_torch, strict=True):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_16_bits_without_a_ring_are_summed_in_float32_and_lose_nothing(name: str, size: int) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[list[Tensor], Tensor, list[int]]:
        delivered = [drawn(exchange.rank, step) for step in range(3)]
        for step, gradients in enumerate(delivered):
            codec.reduce_(gradients, exchange, step)
        return delivered, codec.state()["residual"], exchange.messages

    results = on_ranks(size, name, body)
    first = results[0][0]
    assert all(torch.equal(a, b) for delivered, _, _ in results for a, b in zip(delivered, first, strict=True))
    residual_sum = sum(residual.double() for _, residual, _ in results)
    made = sum(drawn(rank, step).double() for rank in range(size) for step in range(3))
    assert (sum(each.double() for each in first) + residual_sum - made).abs().max() <= 1e-5
    # a message to each owner, and one of its own sum: a scale and 2 bytes for each of the longest part's numbers
    longest = -(-LENGTH // size)
    message = 4 + -(-2 * longest // 4) * 4
    assert results[0][2] == [message] * 6


def test_1024_and_a_half_from_each_of_four_ranks() -> None:
    """In fp16 each half would vanish beside 1024, as 1024.5 is no number of that type: together they are 2."""

    def body(codec: Codec, exchange: ThreadExchange) -> float:
        gradients = torch.full((LENGTH,), 0.5)
        if exchange.rank == 0:
            gradients.fill_(1024.0)
        codec.reduce_(gradients, exchange, 0)
        return float(gradients[0])

    assert on_ranks(5, "fp16", body, error_feedback=False) == [1026.0] * 5


@LOSSY
def test_nothing_makes_nothing(name: str, settings: dict[str, object]) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        gradients = torch.zeros(LENGTH)
        codec.reduce_(gradients, exchange, 0)
        assert not gradients.any() and not codec.state()["residual"].any()
        # and is no obstacle to the next step
        gradients[:5810] = torch.outer(torch.arange(70.0), torch.linspace(-1, 1, 83)).flatten()
        intended = gradients.clone()
        codec.reduce_(gradients, exchange, 1)
        return gradients, intended

    for delivered, intended in on_ranks(2, name, body, **settings):
        assert (delivered - 2 * intended).norm() < 0.99 * (2 * intended).norm()


@LOSSY
def test_the_residual_of_another_codec_is_delivered_where_nothing_is_compressed(
    name: str, settings: dict[str, object]
) -> None:
    """A run may go on by another codec: that one's residual is then not zero anywhere."""

    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        residual = codec.state()["residual"]
        residual.fill_(3.0)
        gradients = torch.ones(LENGTH)
        codec.reduce_(gradients, exchange, 0)
        return codec.bucket.split(gradients)[1], codec.bucket.split(residual)[1]

    for delivered, residual in on_ranks(2, name, body, **settings):
        assert (delivered == 8).all() and (residual == 0).all()


@LOSSY
def test_a_codec_goes_on_from_what_another_has_kept(name: str, settings: dict[str, object]) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        for step in range(3):
            codec.reduce_(drawn(exchange.rank, step), exchange, step)
        resumed = make_codec(name, **settings)
        for old, new in ((codec.state(), resumed.state()), (codec.extra_state(), resumed.extra_state())):
            assert old.keys() == new.keys()
            for key, tensor in old.items():
                new[key].copy_(tensor)
        gradients = [drawn(exchange.rank, 3) for _ in range(2)]
        codec.reduce_(gradients[0], exchange, 3)
        resumed.reduce_(gradients[1], exchange, 3)
        return gradients[0], gradients[1]

    for uninterrupted, resumed in on_ranks(2, name, body, **settings):
        assert torch.equal(uninterrupted, resumed)


@LOSSY
def test_without_error_feedback_nothing_is_owed(name: str, settings: dict[str, object]) -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> tuple[Tensor, Tensor]:
        assert codec.state() == {}
        first, second = drawn(exchange.rank, 0), torch.zeros(LENGTH)
        codec.reduce_(first, exchange, 0)
        codec.reduce_(second, exchange, 1)
        return first, second

    for first, second in on_ranks(2, name, body, error_feedback=False, **settings):
        assert first.any() and not second.any()


def test_density_falls_exponentially_after_the_warm_up() -> None:
    """Messages by hand, for blocks of 200 of which in the end 2 travel."""

    def body(codec: Codec, exchange: ThreadExchange) -> list[int]:
        for step in range(10):
            codec.reduce_(drawn(exchange.rank, step), exchange, step)
        return exchange.messages

    # Whole, then 200 x 0.01^(step / 4 - 1) of a block; full blocks, and the rest of a, b, c and cube beyond the last
    kept = [63, 20, 6, 2, 2]
    blocks, rests = 29 + 41 + 42 + 22, (10, 56, 180, 0)
    expected = [4 * LENGTH] * 5
    for k in kept:
        entries = blocks * k + sum(min(k, rest) for rest in rests)
        values = 4 + -(-2 * entries // 4) * 4  # a scale, and fp16 to a multiple of 4
        expected.append(-(-(4 * (70 + 400) + values + entries) // 4) * 4)
    for messages in on_ranks(2, "topk", body, density=0.01, warmup_steps=4):
        assert messages == expected


def test_powersgd_sends_whole_sums_until_it_is_warm() -> None:
    def body(codec: Codec, exchange: ThreadExchange) -> list[Tensor]:
        delivered = [drawn(exchange.rank, step) for step in range(3)]
        for step, gradients in enumerate(delivered):
            codec.reduce_(gradients, exchange, step)
        return delivered

    for delivered in on_ranks(2, "powersgd", body, warmup_steps=2):
        whole = [drawn(0, step) + drawn(1, step) for step in range(3)]
        assert torch.equal(delivered[0], whole[0])
        assert torch.equal(delivered[1], whole[1])
        assert not torch.allclose(delivered[2], whole[2], atol=0.1)


def test_powersgd_is_its_formula() -> None:
    """Against the paper's algorithm in float64, with an orthonormal basis by another method."""

    def body(codec: Codec, exchange: ThreadExchange) -> tuple[list[Tensor], list[Tensor], list[int]]:
        start = [basis.clone() for basis in codec.extra_state().values()]
        gradients = drawn(exchange.rank, 0)
        codec.reduce_(gradients, exchange, 0)
        return start, codec.bucket.split(gradients), exchange.messages

    for start, delivered, messages in on_ranks(3, "powersgd", body, matrix_rank=4):
        total = make_bucket().split(sum(drawn(rank, 0).double() for rank in range(3)))
        for basis, index in zip(start, (0, 2, 4), strict=True):
            p, _ = torch.linalg.qr(total[index] @ basis.double().t())
            assert torch.allclose(delivered[index].double(), p @ (p.t() @ total[index]), atol=1e-5)
        # two messages: left vectors beside all that is not compressed, right vectors
        assert messages == [4 * (4 * (70 + 64 + 130) + 70 + 400 + 4400), 4 * 4 * (83 + 129 + 66)]


def test_powersgd_finds_the_best_approximation() -> None:
    """Of one gradient again and again: the largest singular vectors, by power iteration."""

    def body(codec: Codec, exchange: ThreadExchange) -> Tensor:
        for step in range(30):
            gradients = drawn(0, 0)
            gradients[:5810] += 3 * torch.outer(drawn(0, 1)[:70], drawn(0, 2)[:83]).flatten()
            codec.reduce_(gradients, exchange, step)
        return codec.bucket.split(gradients)[0]

    (delivered,) = on_ranks(1, "powersgd", body, matrix_rank=1, error_feedback=False)
    whole = drawn(0, 0)[:5810].view(70, 83) + 3 * torch.outer(drawn(0, 1)[:70], drawn(0, 2)[:83])
    u, s, v = torch.linalg.svd(whole.double())
    assert torch.allclose(delivered.double(), s[0] * torch.outer(u[:, 0], v[0]), atol=1e-4 * float(s[0]))


def test_powersgd_keeps_its_directions_through_matrices_of_low_rank() -> None:
    """A gradient of rank 1 leaves the other vectors without a direction; the next, of rank 3, is delivered whole."""

    def low_rank(rank: int) -> Tensor:
        gradients = torch.zeros(LENGTH)
        a, b = drawn(0, 1)[: 70 * rank].view(70, rank), drawn(0, 2)[: 83 * rank].view(rank, 83)
        gradients[:5810] = (a @ b).flatten()
        return gradients

    def body(codec: Codec, exchange: ThreadExchange) -> list[Tensor]:
        delivered = [low_rank(1), low_rank(3)]
        for step, gradients in enumerate(delivered):
            codec.reduce_(gradients, exchange, step)
        return delivered

    (delivered,) = on_ranks(1, "powersgd", body, matrix_rank=3)
    assert torch.allclose(delivered[0], low_rank(1), atol=1e-4)
    assert torch.allclose(delivered[1], low_rank(3), atol=1e-4)


@pytest.mark.parametrize("rank", [3, 9])
def test_loops_and_torch_operations_agree(rank: int) -> None:
    shapes = [(70, 83), (5, 129), (130, 1)]
    layout, start, left, right = [], 7, 0, 0  # numbers before the first matrix are no part of it
    for rows, columns in shapes:
        layout.append((start, rows, columns, left, right))
        start, left, right = start + rows * columns, left + rank * rows, right + rank * columns
    matrices = Matrices(rank, torch.tensor(layout))
    gradients, residual = drawn(0, 0)[:start], drawn(0, 1)[:start]
    rights, lefts = drawn(0, 2)[:right], torch.empty(left)
    multiply(matrices, gradients, residual, rights, lefts)
    again = torch.empty_like(lefts)
    multiply_with_torch(matrices, gradients, residual, rights, again)
    assert torch.allclose(lefts, again, atol=1e-4)
    matrices.split_lefts(lefts)[0][2].copy_(matrices.split_lefts(lefts)[0][0] * 2)  # one that depends on another
    again.copy_(lefts)
    orthonormalise(matrices, lefts)
    orthonormalise_with_torch(matrices, again)
    assert torch.allclose(lefts, again, atol=1e-6)
    # one depends on another; five rows have no more than five directions; all multiples of one number are alike
    independent = ([1, 1, 0] + [1] * (rank - 3), [1] * min(rank, 5) + [0] * max(0, rank - 5), [1] + [0] * (rank - 1))
    for vectors, wanted in zip(matrices.split_lefts(lefts), independent, strict=True):
        assert torch.allclose(vectors @ vectors.t(), torch.diag(torch.tensor(wanted).float()), atol=1e-5)
    product, again = torch.full((start,), 7.0), torch.full((start,), 7.0)
    multiply_factors(matrices, lefts, rights, product)
    multiply_factors_with_torch(matrices, lefts, rights, again)
    assert torch.allclose(product, again, atol=1e-5)
    assert torch.equal(product[:7], torch.full((7,), 7.0))
    own, ours = torch.empty_like(rights), drawn(0, 3)[:right]
    multiply_transposed(matrices, gradients, residual, lefts, own)
    again = torch.empty_like(own)
    multiply_transposed_with_torch(matrices, gradients, residual, lefts, again)
    assert torch.allclose(own, again, atol=1e-4)
    by_loops, by_torch = [(gradients.clone(), residual.clone()) for _ in range(2)]
    reconstruct(matrices, *by_loops, lefts, own, ours)
    reconstruct_with_torch(matrices, *by_torch, lefts, own, ours)
    for one, other in zip(by_loops, by_torch, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(by_loops[0][:7], gradients[:7]) and torch.equal(by_loops[1][:7], residual[:7])
