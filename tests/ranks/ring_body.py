"""The ring against exact sums.

Expected values are sums of integers, exact in float32 whatever their order, or float64 sums of what each rank drew.
"""

from __future__ import annotations

import math

import torch
from checks import check
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.ring import Ring
from hvdlm.gradients.codecs.cast import CastEncoding

LENGTHS = [1, 2, 3, 7, 64, 100, 1001, 5000]
SEGMENTS = [4, 64, 65536]


def drawn(rank: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank * 1000 + length))


def same_everywhere(comm: Communicator, values: Tensor) -> bool:
    return all(torch.equal(values, other) for other in comm.all_gather(values))


def check_sums(comm: Communicator) -> None:
    for segment in SEGMENTS:
        ring = Ring(comm, segment)
        for length in LENGTHS:
            for repetition in range(2):  # the second time its memory is used again
                whole = [(torch.arange(length) * (rank + 1) + repetition) % 1000 for rank in range(comm.size)]
                values = whole[comm.rank].float()
                sent = ring.all_reduce_(values)
                assert torch.equal(values, sum(whole).float()), (segment, length)
                # each rank sends every chunk but one in each of the two phases
                assert abs(sent - 8 * (comm.size - 1) * length / comm.size) <= 8 * comm.size


def check_halves(comm: Communicator) -> None:
    """Each rank has the sum of its own part after the first, and all parts after the second."""
    for segment in SEGMENTS:
        ring = Ring(comm, segment)
        for part in [0, *LENGTHS]:
            length = part * comm.size
            for repetition in range(2):  # the second time its memory is used again
                everyone = [(torch.arange(length) * (rank + 1) + repetition) % 1000 for rank in range(comm.size)]
                exact = torch.stack(everyone).sum(0)
                values = everyone[comm.rank].float()
                own = slice(comm.rank * part, (comm.rank + 1) * part)
                sent = ring.reduce_scatter_(values)
                assert torch.equal(values[own], exact[own].float()), (segment, part)
                assert sent == (comm.size - 1) * part * 4
                for values in (exact.float(), exact.bfloat16(), exact.to(torch.uint8)):
                    gathered = torch.zeros_like(values)
                    gathered[own] = values[own]
                    assert ring.all_gather_(gathered) == (comm.size - 1) * part * values.element_size()
                    assert torch.equal(gathered, values), (segment, part, values.dtype)


@check(sizes=[2, 3, 4])
def check_all_gather(comm: Communicator) -> None:
    for segment in SEGMENTS:
        ring = Ring(comm, segment)
        for length in [0, *LENGTHS]:
            messages = [(torch.arange(length) * (rank + 3)).to(torch.uint8) for rank in range(comm.size)]
            gathered = ring.all_gather(messages[comm.rank])
            assert all(torch.equal(one, other) for one, other in zip(gathered, messages, strict=True))


def check_nothing_beside_is_touched(comm: Communicator) -> None:
    values = torch.full((300,), 7.0)
    Ring(comm, 32).all_reduce_(values[100:200])
    assert torch.equal(values[100:200], torch.full((100,), 7.0 * comm.size))
    assert (values[:100] == 7).all() and (values[200:] == 7).all()


def check_encodings(comm: Communicator) -> None:
    """Equal on all ranks, near the sum, and with the errors exactly it."""
    for dtype, precision in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        for segment in SEGMENTS:
            ring = Ring(comm, segment)
            for length in LENGTHS:
                parts = [drawn(rank, length) for rank in range(comm.size)]
                exact = sum(part.double() for part in parts)
                values, errors = parts[comm.rank].clone(), torch.zeros(length)
                sent = ring.all_reduce_(values, CastEncoding(dtype), errors)
                assert same_everywhere(comm, values)
                # each of at most `size` roundings is of a partial sum that is no larger than all parts together
                bound = comm.size * precision * sum(part.abs() for part in parts)
                assert ((values - exact).abs() <= bound + 1e-6).all(), (dtype, segment, length)
                residual = comm.all_gather(errors).double().sum(0)
                assert torch.allclose(values + residual, exact, rtol=0, atol=1e-5)
                messages = 2 * (comm.size - 1) * math.ceil(length / comm.size / segment + 1)
                assert sent <= 4 * (comm.size - 1) * length / comm.size + 12 * messages
                without = parts[comm.rank].clone()
                ring.all_reduce_(without, CastEncoding(dtype))
                assert torch.equal(without, values)  # keeping account of errors changes nothing
                again = parts[comm.rank].clone()
                ring.all_reduce_(again, CastEncoding(dtype), errors)  # the residual goes with it
                residual_now = comm.all_gather(errors).double().sum(0)
                assert torch.allclose(again + residual_now, exact + residual, rtol=0, atol=1e-5)


@check(sizes=[2, 3, 4])
def check_extreme_numbers(comm: Communicator) -> None:
    """No finite number overflows, none vanishes beside its like, and what is not finite stays so and is no residual."""
    ring = Ring(comm, 64)
    for magnitude in (1e-45, 1e-38, 1e-8, 1e8, 1e37):
        values, errors = torch.full((130,), magnitude), torch.zeros(130)
        ring.all_reduce_(values, CastEncoding(torch.float16), errors)
        assert torch.allclose(values, torch.full((130,), magnitude * comm.size), rtol=1e-3), (magnitude, values)
        assert errors.isfinite().all()
    zeros = torch.zeros(130)
    ring.all_reduce_(zeros, CastEncoding(torch.float16))
    assert (zeros == 0).all()
    for bad in (math.nan, math.inf, -math.inf):
        values, errors = torch.ones(130), torch.zeros(130)
        if comm.rank == comm.size - 1:
            values[70] = bad
        ring.all_reduce_(values, CastEncoding(torch.float16), errors)
        assert not values[70].isfinite()
        assert errors.isfinite().all()
        assert same_everywhere(comm, values.nan_to_num(5.0))
