"""A model that answers requests on several ranks, against the same model on whole sequences, one at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from checks import check

from hvdlm.comm.communicator import Communicator
from hvdlm.config import ModelSection
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.generate_batch import Prompt, Sampling
from hvdlm.model.transformer import Transformer
from hvdlm.scoring.distributed_model import (
    Answer,
    Completion,
    Continuation,
    DistributedModel,
    Request,
    StopRequestedError,
    double_precision,
)

CONFIG = ModelSection(
    layers=2, heads=4, kv_heads=2, width=32, context_length=24, position="rope", norm="rmsnorm", tie_embeddings=False
)


def make_model() -> Transformer:
    """With weights large enough that tokens depend on those before them."""
    model = Transformer(CONFIG, 257)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return model


def distributed(comm: Communicator, batch_size: int, stop: bool = False) -> DistributedModel:
    return DistributedModel(double_precision(make_model()), Tokenizer.byte(), comm, batch_size, lambda: stop)


def texts(count: int) -> list[list[int]]:
    """Of 2 to 25 tokens."""
    numbers = torch.Generator().manual_seed(5)
    lengths = [2 + (7 * number) % 24 for number in range(count)]
    return [torch.randint(0, 256, (length,), generator=numbers).tolist() for length in lengths]


def answered(model: DistributedModel, requests: Sequence[Request], pause: float = 0.0) -> list[Answer] | None:
    """By all ranks, as rank 0 asks; None on others."""
    if model.communicator.rank > 0:
        model.follow()
        return None
    with model.leading():
        time.sleep(pause)
        answers = model.ask(requests)
        assert model.ask(requests) == answers
    return answers


@torch.no_grad()
def logits_after(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([tokens])))[0]  # (T, V)


@check(batch_size=(1, 32))
def check_likelihoods(comm: Communicator, batch_size: int) -> None:
    """However requests are dealt out; also of none, of fewer than ranks, and with heartbeats between them."""
    model, reference = distributed(comm, batch_size), make_model().double()
    for count in (0, 1, 11):
        requests = [Continuation(text, 1 + number % (len(text) - 1)) for number, text in enumerate(texts(count))]
        with patch("hvdlm.scoring.distributed_model._HEARTBEAT", 0.01):
            answers = answered(model, requests, pause=0.1)
        if answers is None:
            continue
        assert len(answers) == count
        for request, answer in zip(requests, answers, strict=True):
            logits = logits_after(reference, request.tokens[:-1])[-request.scored :]
            targets = torch.tensor(request.tokens[-request.scored :])
            own = torch.log_softmax(logits, dim=-1)[torch.arange(request.scored), targets]
            assert answer == (round(sum(own.tolist()), 6), bool((logits.argmax(-1) == targets).all()))


@check()
def check_completions(comm: Communicator) -> None:
    """Greedy ones, of prompts of several lengths, up to their limit."""
    prompts = [text[:13] for text in texts(7)]
    requests = [Completion(Prompt(prompt, 9, Sampling(), 0), ["ab"]) for prompt in prompts]
    answers = answered(distributed(comm, 3), requests)
    if answers is None:
        return
    reference = make_model().double()
    for prompt, answer in zip(prompts, answers, strict=True):
        expected: list[int] = []
        while len(expected) < 9 and expected[-1:] != [256]:
            expected.append(int(logits_after(reference, prompt + expected)[-1].argmax()))
        assert answer == expected


@check()
def check_an_error_of_rank_0(comm: Communicator) -> None:
    model = distributed(comm, 4)
    with pytest.raises(JobError, match=r"^the task is wrong$"):
        if comm.rank > 0:
            model.follow()
        else:
            with model.leading():
                model.ask([Continuation([1, 2], 1)])
                raise HvdlmError("the task is wrong")
    comm.barrier()


@check()
def check_a_request_without_answer(comm: Communicator) -> None:
    """It does not fit into the context; other ranks have requests that do."""
    requests = [Continuation([1, 2, 3], 1)] * comm.size + [Continuation([1] * 30, 1)]
    with pytest.raises(JobError, match=r"a sequence of 29 tokens does not fit into model\.context_length = 24"):
        answered(distributed(comm, 1), requests)
    comm.barrier()


@check()
def check_a_signal(comm: Communicator) -> None:
    """To the last rank."""
    with pytest.raises(StopRequestedError):
        answered(distributed(comm, 2, stop=comm.rank == comm.size - 1), [Continuation([1, 2], 1)] * 9)
    comm.barrier()


@check()
def check_samples(comm: Communicator) -> None:
    """Drawn by their own seeds, whatever the batch: two of one seed are alike, others are not."""
    prompts = [Prompt([65, 66], 9, Sampling(temperature=1.0), seed) for seed in (1, 2, 1, 3)]
    found = [distributed(comm, size).answer([Completion(prompt) for prompt in prompts]) for size in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == found[0][2] != found[0][1] != found[0][3]
    assert comm.all_gather_object(found) == [found] * comm.size
