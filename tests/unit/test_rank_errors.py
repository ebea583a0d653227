"""An error of one rank becomes an error of all; and replicas that are no longer equal are named."""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from thread_rank import on_threads

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.rank_errors import on_all_ranks, on_rank_0, raise_on_all_ranks
from hvdlm.comm.replicas import ReplicaHealer, broadcast_tensors, check_replicas, parameter_hash
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.comm.work import Work
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError

T = TypeVar("T")


def on_ranks(size: int, body: Callable[[Communicator], T]) -> list[T | JobError]:
    """What `body` returns, or the JobError it raises, on each of `size` ranks."""

    def run(communicator: Communicator) -> T | JobError:
        try:
            return body(communicator)
        except JobError as error:
            return error

    return on_threads(size, run)


def sentences(outcomes: list[Any]) -> set[str]:
    assert all(type(outcome) is JobError for outcome in outcomes)
    return {str(outcome) for outcome in outcomes}


def failing_on(*ranks: int) -> Callable[[Communicator], int]:
    def body(communicator: Communicator) -> int:
        def action() -> int:
            if communicator.rank in ranks:
                raise HvdlmError(f"disk {communicator.rank} is full")
            return communicator.rank * 10

        return on_all_ranks(communicator, action)

    return body


# ---- one rank


def test_alone_the_result_is_one_s_own() -> None:
    assert on_all_ranks(SoloCommunicator(), lambda: {"a": 1}) == {"a": 1}
    assert on_all_ranks(SoloCommunicator(), lambda: None) is None
    assert on_rank_0(SoloCommunicator(), lambda: "x") == "x"


def test_alone_an_error_keeps_its_sentence_and_becomes_the_job_s() -> None:
    def fail() -> None:
        raise HvdlmError("the disk is full")

    for function in (on_all_ranks, on_rank_0):
        with pytest.raises(JobError) as caught:
            function(SoloCommunicator(), fail)
        assert str(caught.value) == "the disk is full"


def test_a_bug_is_not_made_into_a_sentence() -> None:
    with pytest.raises(ZeroDivisionError):
        on_all_ranks(SoloCommunicator(), lambda: 1 // 0)


# ---- several


def test_every_rank_gets_its_own_result() -> None:
    assert on_ranks(4, failing_on()) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ([2], "rank 2 on n2: disk 2 is full"),
        ([0], "disk 0 is full"),  # what rank 0 does alone concerns no place
        ([1, 3], "rank 1 on n1 (and 1 more ranks): disk 1 is full"),
        ([0, 1, 2], "rank 0 on n0 (and 2 more ranks): disk 0 is full"),
        ([0, 1, 2, 3], "disk 0 is full"),  # it is the same everywhere
    ],
)
def test_an_error_of_some_ranks_is_raised_on_all(ranks: list[int], sentence: str) -> None:
    assert sentences(on_ranks(4, failing_on(*ranks))) == {sentence}


def test_the_first_rank_works_for_all() -> None:
    worked = []

    def action() -> str:
        worked.append(threading.get_ident())
        return "done"

    assert on_ranks(3, lambda communicator: on_rank_0(communicator, action)) == ["done"] * 3
    assert len(worked) == 1


def test_the_others_wait_as_long_as_the_first_rank_gives_signs_of_life() -> None:
    """Two and a half seconds of work, with a sign after each."""
    signs = []

    def body(communicator: Communicator) -> str:
        gather = communicator.all_reduce_

        def counting(*arguments: Any) -> torch.Tensor:
            signs.append(communicator.rank)
            return gather(*arguments)

        communicator.all_reduce_ = counting  # type: ignore[method-assign]
        return on_rank_0(communicator, lambda: time.sleep(2.5) or "done")  # type: ignore[func-returns-value]

    assert on_ranks(2, body) == ["done"] * 2
    assert signs.count(0) == signs.count(1) >= 2


def test_what_the_first_rank_cannot_do_is_told_as_its_own() -> None:
    def fail() -> None:
        raise HvdlmError("the disk is full")

    assert sentences(on_ranks(3, lambda communicator: on_rank_0(communicator, fail))) == {"the disk is full"}


def test_without_complaints_nothing_is_raised() -> None:
    raise_on_all_ranks(SoloCommunicator(), [None])
    assert on_ranks(2, lambda communicator: raise_on_all_ranks(communicator, [None, None])) == [None, None]


def test_an_empty_message_is_an_error_too() -> None:
    outcomes = on_ranks(2, lambda communicator: raise_on_all_ranks(communicator, [None, ""]))
    assert sentences(outcomes) == {"rank 1 on n1: "}


def test_a_data_set_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    outcomes = on_ranks(2, lambda communicator: on_all_ranks(communicator, lambda: DataSet(tmp_path / "none")))
    (sentence,) = sentences(outcomes)
    assert sentence.startswith(f"{tmp_path / 'none'}: no such data set")


def test_a_data_set_is_opened_by_every_rank(small_data: Path) -> None:
    opened = on_ranks(2, lambda communicator: on_all_ranks(communicator, lambda: DataSet(small_data)))
    assert opened[0] is not opened[1]  # each has files of its own
    assert opened[0].fingerprint == opened[1].fingerprint  # type: ignore[union-attr]


# ---- replicas


def parameters() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(5.0)}


def test_the_hash_is_sha256_over_names_and_bytes() -> None:
    expected = hashlib.sha256(b"a" + struct.pack("<4f", 1, 2, 3, 4) + b"b" + struct.pack("<f", 5)).hexdigest()
    assert parameter_hash(parameters()) == expected
    as_parameters = {name: torch.nn.Parameter(tensor) for name, tensor in parameters().items()}
    assert parameter_hash(as_parameters) == expected
    assert parameter_hash({**parameters(), "a": torch.tensor([[1.0, 3.0], [2.0, 4.0]]).t()}) == expected  # strides


def test_the_hash_sees_a_single_bit_and_the_sign_of_zero() -> None:
    one = torch.ones(3)
    next_up = torch.tensor([1.0, 1.0, 1.0 + 2**-23])
    hashes = {parameter_hash({"a": tensor}) for tensor in (one, next_up, torch.zeros(3), -torch.zeros(3))}
    assert len({*hashes, parameter_hash({"b": one})}) == 5


def test_equal_replicas_pass() -> None:
    check_replicas(SoloCommunicator(), parameters(), 10)
    assert on_ranks(3, lambda communicator: check_replicas(communicator, parameters(), 10)) == [None] * 3


@pytest.mark.parametrize(("odd", "named"), [([2], "rank 2 on n2"), ([0, 3], "rank 0 on n0, 3 on n3")])
def test_replicas_that_differ_from_most_are_named(odd: list[int], named: str) -> None:
    def body(communicator: Communicator) -> None:
        own = parameters()
        if communicator.rank in odd:
            own["b"] += communicator.rank + 1
        check_replicas(communicator, own, 70)

    (sentence,) = sentences(on_ranks(5, body))
    assert sentence.startswith(f"after step 70 the parameters of {named} differ from those of the other ranks: ")


@pytest.mark.parametrize(("dies", "left", "named"), [(False, [0, 1, 2], 0), (True, [0, 2], 0), (True, [1, 0], 1)])
def test_a_rank_that_differs_is_healed(dies: bool, left: list[int], named: int) -> None:
    """Also where another one dies meanwhile: what a rank holds that is half healed is given to nobody.

    `left`: the numbers of those that are left, by rank; number 0 is the one that differs.
    """
    healers = [ReplicaHealer() for _ in range(3)]
    parameters, moments = ([torch.ones(2) for _ in range(3)] for _ in range(2))
    parameters[0].fill_(7)
    moments[0].fill_(7)

    def heal(communicator: Communicator, number: int) -> str | None:
        return healers[number].heal(communicator, {"a": parameters[number]}, [moments[number]], 10)

    def heal_by_half(communicator: Communicator) -> None:
        def moments_that_do_not_arrive() -> Iterator[torch.Tensor]:
            raise DeadRankError("for the test")
            yield

        with pytest.raises(DeadRankError):
            own = {"a": parameters[communicator.rank]}
            healers[communicator.rank].heal(communicator, own, moments_that_do_not_arrive(), 10)

    if dies:
        on_threads(3, heal_by_half)
        parameters[0].fill_(1)  # these have arrived
    said = on_threads(len(left), lambda communicator: heal(communicator, left[communicator.rank]))
    assert all(each is not None and f"of rank {named} on n{named} differed" in each for each in said), said
    assert all(bool((each == 1).all()) for each in [*parameters, *moments])


def test_no_rank_that_is_whole_is_left() -> None:
    healer = ReplicaHealer()
    healer._is_half_healed = True
    with pytest.raises(JobError, match="no rank with whole parameters is left"):
        healer.heal(SoloCommunicator(), {"a": torch.ones(1)}, [], 10)


def test_alone_a_broadcast_changes_nothing() -> None:
    given = parameters()
    broadcast_tensors(SoloCommunicator(), given.values())
    assert parameter_hash(given) == parameter_hash(parameters())


def test_what_is_broadcast_is_not_all_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that stages tensors of a GPU, that is what it holds of pinned memory for ever."""
    under_way: list[int] = []
    most, sizes = 0, []

    def broadcast(_: SoloCommunicator, tensor: torch.Tensor, root: int) -> Work[torch.Tensor]:
        nonlocal most
        sizes.append(tensor.nbytes)
        under_way.append(tensor.nbytes)
        most = max(most, sum(under_way))
        tensor.add_(1)
        return Work(lambda: under_way.pop(0) and tensor)  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(SoloCommunicator, "broadcast_async_", broadcast)
    mebi = 2**20
    tensors = [torch.zeros(9 * mebi), torch.zeros(3), torch.zeros(3 * mebi, 2).t(), torch.zeros((), dtype=torch.int64)]
    broadcast_tensors(SoloCommunicator(), tensors)
    assert all((tensor == 1).all() for tensor in tensors)
    # pieces of 16 MiB; the one that is not contiguous, as it is
    assert sizes == [16 * mebi, 16 * mebi, 4 * mebi, 12, 24 * mebi, 8]
    assert not under_way and most == 32 * mebi
