"""A model that answers requests on all ranks together: each computes some batches.

The model computes in double precision. How a product in single precision rounds depends on its shape, and so would a
score on the batch that a request happens to be in. In double precision such differences are of the order of 1e-13, and
log-likelihoods are rounded to `DIGITS` digits after the point: a request's answer is the same in any batch, with any
padding, on any number of ranks.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.generate_batch import Prompt, generate_batch
from hvdlm.model.likelihood import Likelihood, likelihoods
from hvdlm.model.transformer import Transformer

logger = logging.getLogger(__name__)

DIGITS = 6  # of log-likelihoods, after the point

# Seconds between the messages by which rank 0 tells the others that it is still at work.
_HEARTBEAT = 1.0

# How many times `comm.timeout` rank 0 may take between two lists of requests.
_PATIENCE = 10.0


class Continuation(NamedTuple):
    """How likely are the last `scored` of these tokens? Answered by a `Likelihood`."""

    tokens: Sequence[int]  # at most one more than `context_length`
    scored: int


class Completion(NamedTuple):
    """How does the prompt go on, until its text holds one of `stops`? Answered by the tokens that are added."""

    prompt: Prompt
    stops: Sequence[str] = ()


Request: TypeAlias = Continuation | Completion
Answer: TypeAlias = Likelihood | list[int]


class StopRequestedError(Exception):
    """A signal to some rank asks to stop; every rank raises it."""


class _End(NamedTuple):
    """Rank 0 has no more requests: it is done, or has failed with an error."""

    error: str | None


def double_precision(model: Transformer) -> Transformer:
    """A copy of the model, in evaluation mode, whose parameters and products are in double precision."""
    with torch.device("meta"):
        copy = Transformer(model.config, model.vocab_size)
    copy = copy.double().to_empty(device=model.output_weight.device)
    with torch.no_grad():
        for parameter, source in zip(copy.parameters(), model.parameters(), strict=True):
            parameter.copy_(source)
    return copy.eval()


class DistributedModel:
    """Answers requests about a model in double precision, which every rank has, with all ranks of a communicator.

    Either all ranks call `answer` with the same requests; or one block of code, which only rank 0 runs, makes requests
    as it goes: then rank 0 runs it within `leading` and calls `ask`, and the others call `follow`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        communicator: Communicator,
        batch_size: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """`batch_size`: requests that a rank computes at once, at most."""
        self.model, self.tokenizer, self.communicator = model, tokenizer, communicator
        self._batch_size, self._stop_requested = batch_size, stop_requested
        self._lock = threading.Lock()  # of the communicator, while rank 0 sends heartbeats
        self._heartbeat_error: BaseException | None = None
        self.ranks_have_failed = False  # together: no rank waits for another any more

    # ---- rank 0 asks

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0 may `ask` within this context, and take any time between two lists of requests.

        An HvdlmError that is raised in it becomes a JobError on all ranks.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._send_heartbeats, args=(ended,), name="hvdlm-heartbeat", daemon=True)
        thread.start()

        def stop_heartbeats() -> None:
            ended.set()
            thread.join()

        self._begin_work_of_rank_0()
        try:
            yield
        except HvdlmError as error:
            stop_heartbeats()
            if self.ranks_have_failed:
                raise
            self._raise_heartbeat_error()
            self.communicator.broadcast_object(_End(str(error)))
            raise JobError(str(error)) from error
        except BaseException:
            stop_heartbeats()
            raise
        stop_heartbeats()
        self._raise_heartbeat_error()
        self.communicator.broadcast_object(_End(None))

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Of rank 0: the answers to its requests, in order. Raises what `answer` raises."""
        with self._lock:
            try:
                self._raise_heartbeat_error()
                self.communicator.broadcast_object(requests)
                answers = self.answer(requests)
                self._begin_work_of_rank_0()
                return answers
            except BaseException:
                self.ranks_have_failed = True
                raise

    def follow(self) -> None:
        """Of other ranks: computes its part of what rank 0 asks, to the end of its `leading`.

        Raises what `answer` raises, and JobError if rank 0 has failed.
        """
        while True:
            self.communicator.activity.begin_wait("what rank 0 asks of the model")
            received: Sequence[Request] | _End | None = self.communicator.broadcast_object(None)
            if isinstance(received, _End):
                if received.error is not None:
                    raise JobError(received.error)
                return
            if received is not None:
                self.answer(received)

    def _begin_work_of_rank_0(self) -> None:
        self.communicator.activity.begin("prepares requests or sums up answers", _PATIENCE)

    def _send_heartbeats(self, ended: threading.Event) -> None:
        while not ended.wait(_HEARTBEAT):
            with self._lock:
                if self.ranks_have_failed or ended.is_set():
                    return
                try:
                    self.communicator.broadcast_object(None)
                except BaseException as error:
                    self._heartbeat_error = error
                    return

    def _raise_heartbeat_error(self) -> None:
        if self._heartbeat_error is not None:
            self.ranks_have_failed = True
            raise self._heartbeat_error

    # ---- all ranks answer

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to requests of one kind, which are the same on all ranks, in order. Collective.

        After each batch the ranks exchange a message: none waits longer for a slower one. Raises StopRequestedError on
        all ranks if a signal to one asks to stop, and JobError if a request cannot be answered.
        """
        communicator = self.communicator
        # Longest first: those of a batch are about as long, and what does not fit into memory is known at once
        order = sorted(range(len(requests)), key=lambda index: -_length(requests[index]))
        size = min(self._batch_size, math.ceil(len(requests) / communicator.size))
        batches = [order[start : start + size] for start in range(0, len(order), max(1, size))]
        own: dict[int, Answer] = {}
        for first in range(0, len(batches), communicator.size):
            communicator.activity.begin("computes answers of the model")
            error = None
            if first + communicator.rank < len(batches):
                numbers = batches[first + communicator.rank]
                try:
                    own.update(zip(numbers, self._compute([requests[each] for each in numbers]), strict=True))
                except HvdlmError as failure:
                    error = str(failure)
            communicator.activity.begin_wait("the model's answers")
            flags = torch.tensor([self._stop_requested(), error is not None], dtype=torch.int32)
            stops, errors = communicator.all_reduce_(flags).tolist()
            if errors:
                raise_on_all_ranks(communicator, communicator.all_gather_object(error))
            if stops:
                raise StopRequestedError
        found: dict[int, Answer] = {}
        for part in communicator.all_gather_object(own):
            found.update(part)
        return [found[number] for number in range(len(requests))]

    def _compute(self, requests: Sequence[Request]) -> Sequence[Answer]:
        eos_id = self.tokenizer.eos_id
        continuations = [each for each in requests if isinstance(each, Continuation)]
        if continuations:
            tokens, counts = zip(*continuations, strict=True)
            found = likelihoods(self.model, tokens, counts, eos_id)
            return [Likelihood(round(each.log_probability, DIGITS), each.is_greedy) for each in found]
        completions = [each for each in requests if isinstance(each, Completion)]

        def is_complete(row: int, added: Sequence[int]) -> bool:
            stops = completions[row].stops
            return bool(stops) and any(stop in self.tokenizer.decode(added) for stop in stops)

        prompts = [each.prompt for each in completions]
        return generate_batch(self.model, prompts, eos_id, self.tokenizer.vocab_size, is_complete)


def _length(request: Request) -> int:
    return len(request.tokens if isinstance(request, Continuation) else request.prompt.tokens)
