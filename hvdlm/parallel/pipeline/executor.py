"""Runs the schedule of a step on the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.activity import Activity
from hvdlm.comm.communicator import Communicator
from hvdlm.config import ParallelSection
from hvdlm.model.linear import WeightGradients
from hvdlm.parallel.pipeline.messages import Connections, StepMessages
from hvdlm.parallel.pipeline.schedules import (
    Kind,
    Operation,
    Schedule,
    arrivals,
    forward_only,
    make_schedule,
    received_by,
    sent_by,
)
from hvdlm.parallel.pipeline.stage_model import StageModel
from hvdlm.timing import StepTimer


class MicroBatch(NamedTuple):
    """Sequences that go through the pipeline at once; every rank has them."""

    tokens: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64
    documents: Tensor | None = None  # (b, T) int64, as from `document_ids`


class _Passed(NamedTuple):
    """What a forward pass leaves behind for the backward pass."""

    given: Tensor | None  # from the stage before; None on the first one
    made: Tensor  # for the next stage, or the loss


class Pipeline:
    """The ranks that divide the blocks of a model among them, each with a `StageModel`."""

    def __init__(
        self, model: StageModel, pipeline: Communicator, settings: ParallelSection, activity: Activity | None = None
    ) -> None:
        """`pipeline`: its ranks, in the order of their first stages. `activity`: where this rank says what it does.
        Collective.
        """
        self._model, self._communicator, self._settings = model, pipeline, settings
        self._activity = activity or pipeline.activity
        self._connections = Connections(pipeline)
        if settings.divides_backward_passes:
            model.divide_backward_passes()

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Callable[[Tensor, Tensor], Tensor],
        factor: float,
        timer: StepTimer,
        before_last: Callable[[], None] = lambda: None,
        seed: Callable[[int, int], None] = lambda micro_batch, stage: None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """The passes of one step, whose gradients are added to `.grad`; what it returns is not empty on the last stage
        alone: the loss of each micro-batch.

        loss: of hidden states (b, T, D) and targets (b, T), a scalar, of which `factor` times is differentiated.
        before_last: called before the last gradients are made. seed: called with the numbers of a micro-batch and a
        stage before its forward pass, for dropout. after_backward: called after every whole backward pass of a chunk.
        The phases of `timer` are "forward", "backward" and "wait".
        """
        chunks, ranks = len(self._model.chunks), self._communicator.size
        schedule = make_schedule(self._settings.schedule, ranks, len(micro_batches), chunks)
        messages = self._messages(schedule, micro_batches)
        step = _Step(self._model, micro_batches, loss, factor)
        own = schedule[self._communicator.rank]
        for number, operation in enumerate(own, start=1):
            where = f"micro-batch {operation.micro_batch + 1} of {len(micro_batches)}"
            if number == len(own):
                before_last()
            received = self._receive(operation, messages, where, timer)
            self._activity.begin(f"computes the {operation.kind.value} of {where}")
            if operation.kind is Kind.FORWARD:
                seed(operation.micro_batch, self._stage(operation))
                self._send(operation, messages, step.forward(operation, received))
            else:
                self._send(operation, messages, step.backward(operation, received))
            if operation.kind is Kind.BACKWARD:
                after_backward()
            timer.end_phase("forward" if operation.kind is Kind.FORWARD else "backward")
        if not own:
            before_last()
        self._finish(messages, timer)
        return step.losses

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], visit: Callable[[Tensor, Tensor], None]) -> None:
        """Forward passes alone. `visit`: called on the last stage with the hidden states, (b, T, D), and the targets,
        (b, T), of each micro-batch.
        """
        schedule = forward_only(self._communicator.size, len(micro_batches), len(self._model.chunks))
        timer = StepTimer(self._model.device)
        messages = self._messages(schedule, micro_batches)
        for operation in schedule[self._communicator.rank]:
            micro_batch = micro_batches[operation.micro_batch]
            where = f"micro-batch {operation.micro_batch + 1} of {len(micro_batches)} of a validation"
            received = self._receive(operation, messages, where, timer)
            self._activity.begin(f"computes {where}")
            made = self._model.apply_chunk(operation.chunk, received, micro_batch.tokens, micro_batch.documents)
            self._send(operation, messages, made)
            if self._model.chunks[operation.chunk].is_last:
                visit(made, micro_batch.targets)
        self._finish(messages, timer)

    @torch.no_grad()
    def add_tied_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Adds the gradient of a tied matrix on the first stage to that on the last one, on both. Once a step, after
        its passes and what sums gradients over other ranks.

        parameters: that this rank steps, by name, each with its `.grad`. Of the matrix it may be a part, the same one
        on both stages, or none. Two numbers have one sum in either order, so both stages have the same bits, whatever
        the order in which ranks of each have added theirs.
        """
        for name in self._model.in_two_stages():
            if name in parameters:
                gradient = parameters[name].grad
                assert gradient is not None
                peer = self._communicator.size - 1 if self._model.has_first_stage else 0
                self._activity.begin_wait("the gradient of the tied embedding")
                arrives = self._connections.receive_(torch.empty_like(gradient), peer)
                has_sent = self._connections.send(gradient.clone(), peer)
                gradient += arrives.wait()
                has_sent()

    def close(self) -> None:
        """Closes what was opened for messages. Collective."""
        self._connections.close()

    def _messages(self, schedule: Schedule, micro_batches: Sequence[MicroBatch]) -> StepMessages:
        def shape_of(number: int) -> tuple[int, int, int]:
            batch, length = micro_batches[number].tokens.shape
            return batch, length, self._model.config.width

        expected = arrivals(schedule, self._communicator.rank, len(self._model.chunks))
        return StepMessages(self._connections, expected, shape_of, self._settings.boundary, self._model.device)

    def _stage(self, operation: Operation) -> int:
        return operation.chunk * self._communicator.size + self._communicator.rank

    def _receive(self, operation: Operation, messages: StepMessages, where: str, timer: StepTimer) -> Tensor | None:
        message = received_by(operation, self._communicator.rank, self._communicator.size, len(self._model.chunks))
        if message is None:
            return None
        self._activity.begin_wait(f"what the {operation.kind.value} of {where} needs")
        received = messages.receive(message)
        timer.end_phase("wait")
        return received

    def _send(self, operation: Operation, messages: StepMessages, made: Tensor | None) -> None:
        message = sent_by(operation, self._communicator.rank, self._communicator.size, len(self._model.chunks))
        if message is not None:
            assert made is not None
            messages.send(made, message.stage % self._communicator.size)

    def _finish(self, messages: StepMessages, timer: StepTimer) -> None:
        self._activity.begin_wait("the other stages to receive")
        messages.finish()
        timer.end_phase("wait")


class _Step:
    """What is kept of the passes of one step."""

    def __init__(
        self,
        model: StageModel,
        micro_batches: Sequence[MicroBatch],
        loss: Callable[[Tensor, Tensor], Tensor],
        factor: float,
    ) -> None:
        self.losses: list[Tensor] = []
        self._model, self._micro_batches, self._loss, self._factor = model, micro_batches, loss, factor
        self._passed: dict[tuple[int, int], _Passed] = {}  # by micro-batch and chunk
        self._left_out: dict[tuple[int, int], WeightGradients] = {}

    def forward(self, operation: Operation, received: Tensor | None) -> Tensor:
        """What the next stage is sent, or the loss. received: (b, T, D), or None on the first stage."""
        micro_batch = self._micro_batches[operation.micro_batch]
        if received is not None:
            received.requires_grad_()
        made = self._model.apply_chunk(operation.chunk, received, micro_batch.tokens, micro_batch.documents)
        if self._model.chunks[operation.chunk].is_last:
            made = self._loss(made, micro_batch.targets)
            self.losses.append(made.detach())
        self._passed[operation[1:]] = _Passed(received, made)
        return made

    def backward(self, operation: Operation, received: Tensor | None) -> Tensor | None:
        """The gradient of what the forward pass received. received: of what it sent; None on the last stage."""
        key = operation[1:]
        if operation.kind is Kind.WEIGHT_GRADIENT:
            self._left_out.pop(key).make()
            return None
        passed = self._passed.pop(key)
        gradient = torch.full_like(passed.made, self._factor) if received is None else received
        if operation.kind is Kind.BACKWARD:
            torch.autograd.backward(passed.made, gradient)
        else:
            left_out = self._left_out[key] = WeightGradients()
            with left_out.left_out():
                torch.autograd.backward(passed.made, gradient)
        return passed.given.grad if passed.given is not None else None
