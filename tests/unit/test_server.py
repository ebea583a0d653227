"""Parameter servers: what they do not go with, and gradients as messages to owners that make none themselves."""

from __future__ import annotations

import pytest
import torch
from test_config import configure, refusal
from torch import nn

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.registry import codec_factory
from hvdlm.strategies.server.rounds import ServedRounds
from hvdlm.strategies.server.tasks import Tasks
from hvdlm.training.due import recurs


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("local_steps.every", "4", "set server.max_staleness above 0 with it"),
        ("parallel.shard", "1", "it does not go with [parallel]"),
        ("parallel.tensor", "2", "it does not go with [parallel]"),
        ("comm.elastic", "true", "server.ranks does not go with comm.elastic = true"),
        ("optimizer.algorithm", "muon", "optimizer.algorithm = 'muon' needs whole matrices"),
        ("optimizer.algorithm", "dion", "optimizer.algorithm = 'dion' needs whole matrices"),
        ("compression.codec", "auto", "compression.codec = 'auto' cannot send gradients to servers"),
        ("compression.hierarchical", "true", "leave it out with server.ranks"),
        ("train.precision", "fp16", "with server.ranks set it to bf16 or fp32"),
        ("train.heal_replicas", "true", "it does not go with server.ranks"),
        ("train.ema", "0.9", "it does not go with server.ranks"),
    ],
)
def test_what_servers_do_not_go_with(name: str, value: str, sentence: str) -> None:
    assert sentence in refusal("--server.ranks", "1", f"--{name}", value)


def test_settings() -> None:
    config = configure("--server.ranks", "2", "--server.pull", "bf16")
    assert (config.server.ranks, config.server.pull) == (2, "bf16")
    assert "set server.ranks with it" in refusal("--server.pull", "bf16")
    assert "server.ranks = -1" in refusal("--server.ranks", "-1")


# Most bytes of a message for each number
BYTES = {"none": 4, "fp16": 2.1, "bf16": 2.1, "int8": 1.1, "int4": 0.6, "int2": 0.35, "topk": 0.2, "topk2": 0.15}


@pytest.mark.parametrize("codec", [*BYTES, "powersgd"])
@pytest.mark.parametrize("owners", [1, 3])
def test_what_owners_add_and_what_is_left_are_the_gradients(codec: str, owners: int) -> None:
    """Of three steps of two ranks. The buffer is as long as a multiple of the owners, of whom one gets rows of a matrix
    in part; a bias and a matrix.
    """
    generator = torch.Generator().manual_seed(1)
    matrix, bias = nn.Parameter(torch.zeros(96, 100)), nn.Parameter(torch.zeros(96))
    settings = CompressionSection(codec=codec)
    buckets = [Bucket({"matrix": matrix, "bias": bias}) for _ in range(3)]
    senders = [codec_factory(codec)(bucket, settings) for bucket in buckets[:2]]
    receiver = codec_factory(codec)(buckets[2], settings)
    length = len(buckets[0].buffer)
    assert length % owners == 0
    total, delivered = torch.zeros(length, dtype=torch.float64), torch.zeros(length)
    for step in range(3):
        for sender in senders:
            gradients = torch.randn(length, generator=generator)
            total += gradients
            messages = sender.messages_to_owners(gradients, owners, step)
            assert sum(map(len, messages)) <= length * BYTES.get(codec, 1.0)
            for owner, message in enumerate(messages):
                part = delivered.split(length // owners)[owner]
                receiver.add_message_(message.clone(), part, owner, owners, step)
    left = [flat.double() for sender in senders for flat in sender.state().values()]
    assert torch.allclose(delivered.double() + sum(left), total, atol=1e-5)
    assert codec == "none" or max(each.abs().max() for each in left) > 1e-4


@pytest.mark.parametrize("codec", ["topk", "topk2", "powersgd"])
def test_all_is_sent_at_first(codec: str) -> None:
    """In the warm-up of a codec owners get all gradients, bit for bit, and what is taken back stays with the sender."""
    matrix = nn.Parameter(torch.zeros(96, 100))
    sender, receiver = (
        codec_factory(codec)(Bucket({"matrix": matrix}), CompressionSection(codec=codec, warmup_steps=2)) for _ in "ab"
    )
    gradients = torch.randn(9600, generator=torch.Generator().manual_seed(1))
    (residual,) = sender.state().values()
    residual.fill_(0.5)
    delivered = torch.zeros(9600)
    sent = gradients.clone()
    for owner, message in enumerate(sender.messages_to_owners(sent, 3, step=1)):
        receiver.add_message_(message, delivered[3200 * owner :][:3200], owner, 3, step=1)
    assert delivered.equal(gradients + 0.5)
    assert not residual.any()
    if sender.can_take_back(sent):
        sender.take_back_(sent, 3)
        assert (residual == 0.5).all()


def test_rows_of_low_rank_matrices_by_hand() -> None:
    """A matrix of rank 1 is delivered whole by PowerSGD of rank 2, to owners that divide its rows between columns."""
    column, row = (torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (128, 96))
    gradients = torch.outer(column, row).flatten()
    settings = CompressionSection(codec="powersgd", matrix_rank=2)
    sender, receiver = (
        codec_factory("powersgd")(Bucket({"m": nn.Parameter(torch.zeros(128, 96))}), settings) for _ in "ab"
    )
    delivered = torch.zeros(12288)
    messages = sender.messages_to_owners(gradients.clone(), 3, 0)
    # 4096 numbers are 42 2/3 rows: 43 of the first owner, 44 of the second and 43 of the last, and 96 columns for each
    assert [len(message) for message in messages] == [4 * 2 * (rows + 96) for rows in (43, 44, 43)]
    for owner, message in enumerate(messages):
        receiver.add_message_(message, delivered[4096 * owner :][:4096], owner, 3, 0)
    assert torch.allclose(delivered, gradients, atol=1e-5)


# ---- who trains on what


def test_rounds_of_local_steps() -> None:
    """Of 10 batches, 4 each: 0-3, 4-7, 8-9; a job that goes on from step 6 begins within the second one."""
    rounds = ServedRounds(4, 10)
    assert rounds.count == 3
    assert [rounds.end(version) for version in range(4)] == [0, 4, 8, 10]
    assert [rounds.version_after(batches) for batches in (0, 3, 4, 6, 9, 10)] == [0, 0, 1, 1, 2, 3]
    assert [rounds.first_after(batches) for batches in (1, 4, 5, 9, 99)] == [1, 1, 2, 3, 3]
    assert [[*rounds.batches_from(first)] for first in (0, 6, 8)] == [[0, 1, 2, 3], [6, 7], [8, 9]]


def test_what_is_due_in_a_round() -> None:
    """Every 6 steps, in rounds of 4 steps: where a round ends that has step 6, 12 or 18, or the last, shorter one."""
    assert [step for step in (4, 8, 12, 16, 20, 22) if recurs(step, 6, 4)] == [8, 12, 20]
    assert [step for step in range(1, 13) if recurs(step, 6)] == [6, 12]
    assert not recurs(4, 0, 4)


def test_tasks_are_handed_out_once_and_in_order() -> None:
    """Batches 2 and 3 of two shares each, to three workers."""
    tasks = Tasks(2, 2)
    assert [tasks.hand_out(worker, end=4) for worker in (0, 1, 2)] == [4, 5, 6]
    assert tasks.rounds_begun == 4
    assert tasks.done(1) == 5
    assert [tasks.hand_out(1, end=4), tasks.held] == [7, {0: 4, 1: 7, 2: 6}]
    assert tasks.done(2) == 6
    assert tasks.hand_out(2, end=4) is None


def test_what_a_worker_gives_back_comes_first() -> None:
    tasks = Tasks(0, 3)
    assert [tasks.hand_out(worker, end=9) for worker in (0, 1, 2)] == [0, 1, 2]
    assert tasks.give_back(2) == 2
    assert tasks.give_back(0) == 0
    assert tasks.give_back(0) is None
    assert [tasks.hand_out(worker, end=9) for worker in (3, 4, 5)] == [0, 2, 3]
    assert tasks.rounds_begun == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--train.max_time", "1h"], "need workers that meet after every step"),
        (["--train.patience", "2"], "need workers that meet after every step"),
        (["--train.balance", "true"], "a fast worker gets more anyway"),
        (["--data.on_corrupt", "skip"], "set it to 'fail' with server.max_staleness"),
    ],
)
def test_what_does_not_go_with_workers_that_do_not_meet(words: list[str], sentence: str) -> None:
    assert sentence in refusal("--server.ranks", "1", "--server.max_staleness", "4", *words)
    assert configure("--server.ranks", "1", *words).server.max_staleness == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--local_steps.every", "auto"], "with server.ranks set it to a number"),
        (["--local_steps.every", "4", "--server.predict", "true"], "is not tried with local_steps.every"),
        (
            ["--local_steps.every", "4", "--local_steps.overlap", "1", "--local_steps.by", "seconds"],
            "every, lr and momentum go with server.ranks: leave out local_steps.by, local_steps.overlap",
        ),
    ],
)
def test_what_local_steps_of_workers_do_not_go_with(words: list[str], sentence: str) -> None:
    assert sentence in refusal("--server.ranks", "1", "--server.max_staleness", "4", *words)


def test_settings_of_late_gradients() -> None:
    assert "set server.ranks with it" in refusal("--server.max_staleness", "4")
    assert "set server.max_staleness with them" in refusal("--server.ranks", "1", "--server.predict", "true")
