"""Schedules of pipeline parallelism: which rank does what, in which order, in one step.

A schedule is a list of operations for each rank. An operation is one pass of one micro-batch over one chunk of a
rank's model; what it receives and sends follows from it. Of `ranks` ranks, rank r has the stages r, r + ranks, ... of
the model as its chunks 0, 1, ..., and all schedules but the interleaved one have one chunk a rank.

Nothing here knows of tensors or communicators: schedules are pure functions, which simulation.py tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What an operation computes."""

    FORWARD = "forward"
    BACKWARD = "backward"  # all gradients
    INPUT_GRADIENT = "input gradient"  # of a backward pass, what the stage before waits for
    WEIGHT_GRADIENT = "weight gradient"  # the rest of it


class Operation(NamedTuple):
    """A pass of a micro-batch over a chunk."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


class Message(NamedTuple):
    """Activations for a stage, or the gradient of what a stage has sent."""

    is_gradient: bool
    micro_batch: int
    stage: int  # that receives it


Schedule = Sequence[Sequence[Operation]]  # by rank


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965, section 2.3).

    Every rank holds activations of all micro-batches. They are taken in one order in both directions, so that gradients
    are added in the order in which one rank adds them.
    """
    own = [Operation(kind, each) for kind in (Kind.FORWARD, Kind.BACKWARD) for each in range(micro_batches)]
    return [own] * ranks


def one_forward_one_backward(ranks: int, micro_batches: int) -> Schedule:
    """After a warm-up one forward and one backward pass in turns (Narayanan et al. 2021, arXiv:2104.04473, section
    2.2.1, after PipeDream-Flush). Rank r holds activations of at most `ranks - r` micro-batches.
    """
    return [_whole_passes(micro_batches, warm_up=ranks - 1 - rank) for rank in range(ranks)]


def eager_1f1b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B with twice the warm-up (Zhuang et al. 2023, arXiv:2211.05322, section 4.2). Rank r holds activations of at
    most `2 (ranks - r) - 1` micro-batches.

    With 1F1B each forward pass needs, through the ranks after it, the message of the backward pass just before: what
    messages take is waited for with every micro-batch. Here it may take as long as the passes in between.
    """
    return [_whole_passes(micro_batches, warm_up=2 * (ranks - 1 - rank)) for rank in range(ranks)]


def interleaved(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """One forward, one backward with several chunks a rank (Narayanan et al. 2021, section 2.2.2).

    Micro-batches go through a chunk in groups of as many as there are ranks. The paper wants whole groups; here the
    last one may be smaller, at the price of a longer bubble.
    """
    groups = [range(start, min(start + ranks, micro_batches)) for start in range(0, micro_batches, ranks)]
    forwards = [Operation(Kind.FORWARD, each, chunk) for group in groups for chunk in range(chunks) for each in group]
    backwards = [
        [Operation(Kind.BACKWARD, each, chunk)]
        for group in groups
        for chunk in reversed(range(chunks))
        for each in group
    ]
    return [
        _in_turns(forwards, backwards, warm_up=2 * (ranks - 1 - rank) + (chunks - 1) * ranks) for rank in range(ranks)
    ]


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1: 1F1B whose backward passes are divided (Qi et al. 2024, arXiv:2401.10241, section 3).

    Gradients of inputs go to the stage before at once. Rank r makes those of weights r micro-batches later, in the time
    in which it would wait at the end: so every rank holds activations of at most `ranks` micro-batches, as many as the
    first one with 1F1B.
    """
    return [_divided_passes(micro_batches, warm_up=ranks - 1 - rank, late=rank) for rank in range(ranks)]


def zero_bubble_h2(ranks: int, micro_batches: int) -> Schedule:
    """The warm-up and the memory of ZB-H2 (Qi et al. 2024, section 3): every rank holds activations of at most
    `2 ranks - 1` micro-batches.

    ZB-H2 has no bubble where an optimizer's step need not wait for the gradients of all ranks. Here it does, and the
    last rank begins `ranks - 1` forward passes late; no other wait is left, also where gradients of inputs take longer
    than those of weights, and messages take time.
    """
    return [_divided_passes(micro_batches, warm_up=2 * (ranks - 1 - rank), late=2 * rank) for rank in range(ranks)]


def forward_only(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """For validation: one micro-batch after the other."""
    groups = [range(start, min(start + ranks, micro_batches)) for start in range(0, micro_batches, ranks)]
    own = [Operation(Kind.FORWARD, each, chunk) for group in groups for chunk in range(chunks) for each in group]
    return [own] * ranks


def make_schedule(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The schedule that `parallel.schedule` names."""
    if name == "interleaved":
        return interleaved(ranks, micro_batches, chunks)
    make = {
        "gpipe": gpipe,
        "1f1b": one_forward_one_backward,
        "eager_1f1b": eager_1f1b,
        "zero_bubble": zero_bubble,
        "zero_bubble_h2": zero_bubble_h2,
    }[name]
    return make(ranks, micro_batches)


def received_by(operation: Operation, rank: int, ranks: int, chunks: int) -> Message | None:
    """What an operation of a rank waits for."""
    stage = operation.chunk * ranks + rank
    if operation.kind is Kind.FORWARD:
        return Message(False, operation.micro_batch, stage) if stage > 0 else None
    if operation.kind is Kind.WEIGHT_GRADIENT or stage == ranks * chunks - 1:
        return None
    return Message(True, operation.micro_batch, stage)


def sent_by(operation: Operation, rank: int, ranks: int, chunks: int) -> Message | None:
    """What an operation of a rank sends when it has ended."""
    stage = operation.chunk * ranks + rank
    if operation.kind is Kind.FORWARD:
        return Message(False, operation.micro_batch, stage + 1) if stage < ranks * chunks - 1 else None
    if operation.kind is Kind.WEIGHT_GRADIENT or stage == 0:
        return None
    return Message(True, operation.micro_batch, stage - 1)


def arrivals(schedule: Schedule, rank: int, chunks: int) -> dict[int, list[Message]]:
    """The messages for a rank by the rank that sends them, in the order in which it does."""
    ranks = len(schedule)
    found: dict[int, list[Message]] = {}
    for source, operations in enumerate(schedule):
        for operation in operations:
            message = sent_by(operation, source, ranks, chunks)
            if message is not None and message.stage % ranks == rank:
                found.setdefault(source, []).append(message)
    return found


def _whole_passes(micro_batches: int, warm_up: int) -> list[Operation]:
    """One rank's, with backward passes that make all gradients."""
    backwards = [[Operation(Kind.BACKWARD, each)] for each in range(micro_batches)]
    return _in_turns([Operation(Kind.FORWARD, each) for each in range(micro_batches)], backwards, warm_up)


def _divided_passes(micro_batches: int, warm_up: int, late: int) -> list[Operation]:
    """One rank's, with gradients of weights made `late` micro-batches after those of inputs."""
    backwards = []
    for each in range(micro_batches):
        then = [Operation(Kind.WEIGHT_GRADIENT, each - late)] if each >= late else []
        backwards.append([Operation(Kind.INPUT_GRADIENT, each), *then])
    own = _in_turns([Operation(Kind.FORWARD, each) for each in range(micro_batches)], backwards, warm_up)
    left = range(max(0, micro_batches - late), micro_batches)
    return [*own, *(Operation(Kind.WEIGHT_GRADIENT, each) for each in left)]


def _in_turns(forwards: Sequence[Operation], backwards: Sequence[Sequence[Operation]], warm_up: int) -> list[Operation]:
    """`warm_up` forward passes, then one of each in turns, then the backward passes that are left."""
    warm_up = min(warm_up, len(forwards))
    order = list(forwards[:warm_up])
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, *backward]
    for backward in backwards[len(forwards) - warm_up :]:
        order += backward
    return order
