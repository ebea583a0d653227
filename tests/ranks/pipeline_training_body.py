"""The training step of a pipeline, with replicas of it or without, against plain PyTorch on the joined batch: SGD."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch
from checks import check
from torch import Tensor, nn
from torch.nn import functional
from training_body import (
    LENGTH,
    RATE,
    SEQUENCES,
    VOCABULARY,
    Batches,
    flat,
    global_batch,
    make_config,
    make_plain_model,
    make_trainer,
    plain_loss,
)

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.loader import Batch
from hvdlm.errors import JobError
from hvdlm.strategies.strategy import UnreadableBatchError
from hvdlm.training.evaluation import evaluate
from hvdlm.training.trainer import Trainer


def pipeline_config(schedule: str, clip_norm: float = 0.3, precision: str = "fp32", codec: str = "none") -> Config:
    """Two stages; 4 ranks have two replicas of them, of which one has 3 and one 4 sequences."""
    config = make_config(precision, clip_norm, codec)  # type: ignore[arg-type]
    changed = config.model_dump(by_alias=True)
    changed["model"]["layers"] = 4
    changed["parallel"] = {"pipeline": 2, "schedule": schedule}
    changed["train"]["micro_batch_size"] = 1
    return Config.model_validate(changed)


def distance(trainer: Trainer, begin: dict[str, Tensor], plain: nn.Module) -> float:
    """Between how this rank's parameters have moved and how plain ones have, in units of the latter."""
    names = dict(trainer.model.named_parameters())
    start = torch.cat([begin[name].flatten() for name in names])
    expected = torch.cat([dict(plain.named_parameters())[name].detach().flatten() for name in names]) - start
    return float((flat(trainer.model) - start - expected).norm() / expected.norm())


@check(sizes=[2, 4], schedule=["gpipe", "1f1b", "eager_1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"])
def check_steps_of_sgd(comm: Communicator, schedule: str) -> None:
    """Parameters, loss and norm are those of PyTorch's own loss, `clip_grad_norm_` and SGD; targets are missing."""
    config = pipeline_config(schedule)
    trainer, plain = make_trainer(comm, config), make_plain_model(config)
    assert trainer.readers.size == comm.size // 2
    batches = Batches(trainer.readers, 0, ignored=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    begin = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    norms = []
    for step in range(4):
        trainer.train_step(batches, False)
        optimizer.zero_grad()
        loss = plain_loss(plain, step, ignored=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.3))
        optimizer.step()
        norms.append(norm)
        assert distance(trainer, begin, plain) <= 1e-5, (step, distance(trainer, begin, plain))
        record = trainer.metrics.train[step]
        assert abs(record["grad_norm"] / norm - 1) <= 1e-5, (step, record["grad_norm"], norm)
        assert abs(record["loss"] / float(loss.detach()) - 1) <= 1e-6, (step, record["loss"], loss)
        assert record["world_size"] == comm.size
    assert not trainer.metrics.events
    assert min(norms) > 0.3  # so 0.3 clips them all
    phases = trainer.timer.seconds()
    assert min(phases["forward"], phases["backward"], phases["wait"]) > 0
    replicas = trainer.readers.all_gather(flat(trainer.model))
    assert all(torch.equal(replicas[0], each) for each in replicas)


@check(sizes=[2, 4], schedule=["1f1b", "interleaved"])
def check_stages_by_speed(comm: Communicator, schedule: str) -> None:
    """The last rank of the first stage is three times slower than all others: its stage has fewer blocks, in every
    pipeline, and steps are those of plain PyTorch."""
    config = pipeline_config(schedule)
    config = config.model_copy(update={"train": config.train.model_copy(update={"balance": True})})
    slow = comm.size // 2 - 1
    with patch("hvdlm.training.stage_speeds.seconds_of_block", lambda *_: 0.3 if comm.rank == slow else 0.1):
        trainer = make_trainer(comm, config)
    own = len({name.split(".")[1] for name, _ in trainer.model.named_parameters() if name.startswith("blocks.")})
    counts = comm.all_gather_object(own)
    assert counts == [1] * (comm.size // 2) + [3] * (comm.size // 2), counts
    assert f"on rank {slow}, on {comm.hosts[slow]}" in trainer.sentences[0], trainer.sentences
    plain, batches = make_plain_model(config), Batches(trainer.readers, 0, ignored=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    begin = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for step in range(2):
        trainer.train_step(batches, False)
        optimizer.zero_grad()
        plain_loss(plain, step, ignored=True).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
    assert distance(trainer, begin, plain) <= 1e-5


@check(sizes=[2, 4], stage=[0, 1])
def check_gradients_that_are_not_finite(comm: Communicator, stage: int) -> None:
    """Of one stage: no stage steps, and the next step is that of plain PyTorch."""
    config = pipeline_config("1f1b")
    trainer, plain = make_trainer(comm, config), make_plain_model(config)
    batches = Batches(trainer.readers, 0, ignored=False)
    begin = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    before = flat(trainer.model)
    handle = None
    if comm.rank == stage * comm.size // 2:
        parameter = next(trainer.model.blocks.parameters())
        handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_step(batches, False)
    if handle is not None:
        handle.remove()
    assert torch.equal(flat(trainer.model), before)
    trainer.train_step(batches, False)
    plain_loss(plain, 1, ignored=False).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
    torch.optim.SGD(plain.parameters(), lr=RATE).step()
    assert distance(trainer, begin, plain) <= 1e-5


@check(sizes=[2, 4], precision=["bf16", "fp16"])
def check_low_precision(comm: Communicator, precision: str) -> None:
    """Near the steps of fp32: products are rounded, and fp16's loss is scaled."""
    config = pipeline_config("zero_bubble", clip_norm=0.0, precision=precision)
    trainer, plain = make_trainer(comm, config), make_plain_model(config)
    batches = Batches(trainer.readers, 0, ignored=True)
    begin = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    trainer.train_step(batches, False)
    plain_loss(plain, 0, ignored=True).backward()
    torch.optim.SGD(plain.parameters(), lr=RATE).step()
    assert distance(trainer, begin, plain) <= 0.05
    assert not trainer.metrics.events


@check(sizes=[4], codec=["int8", "topk"])
def check_lossy_codecs(comm: Communicator, codec: str) -> None:
    """Between replicas: those of a stage stay equal, and so do both copies of the tied matrix; the loss falls."""
    trainer = make_trainer(comm, pipeline_config("1f1b", codec=codec))
    batches = Batches(trainer.readers, 0, ignored=False)
    for _ in range(6):
        trainer.train_step(batches, False)
    replicas = trainer.readers.all_gather(flat(trainer.model))
    assert torch.equal(replicas[0], replicas[1])
    tied = comm.all_gather(trainer.model.token_embedding.weight.detach())
    assert all(torch.equal(tied[0], each) for each in tied)
    losses = [record["loss"] for record in trainer.metrics.train]
    assert losses[-1] < losses[0] - 0.005


@check(sizes=[4])
def check_replicas_of_one_stage_that_differ(comm: Communicator) -> None:
    """All ranks hear of it, and the stage whose replicas are equal does not go on alone."""
    config = pipeline_config("1f1b")
    train = config.train.model_copy(update={"check_replicas_every": 1})
    trainer = make_trainer(comm, config.model_copy(update={"train": train}))
    batches = Batches(trainer.readers, 0, ignored=False)
    trainer.train_step(batches, False)
    if comm.rank == 3:
        with torch.no_grad():
            trainer.model.final_norm.weight[5] += 0.25
    try:
        trainer.train_step(batches, False)
    except JobError as error:
        assert "differ" in str(error)
    else:
        raise AssertionError("nobody has noticed")


class Unreadable(Batches):
    """Of which one rank cannot read the first batch."""

    def __init__(self, trainer: Trainer, rank: int) -> None:
        super().__init__(trainer.readers, 0, ignored=False)
        self._is_broken = trainer.communicator.rank == rank

    def next(self) -> Batch:
        if self._is_broken:
            raise JobError("shard 3 is gone")
        return super().next()


@check(sizes=[2, 4], rank=[0, 1])
def check_a_batch_that_one_rank_cannot_read(comm: Communicator, rank: int) -> None:
    """All ranks learn of it before one waits for another."""
    trainer = make_trainer(comm, pipeline_config("1f1b"))
    before = flat(trainer.model)
    try:
        trainer.train_step(Unreadable(trainer, rank), False)
    except UnreadableBatchError as error:
        assert "shard 3 is gone" in str(error)
    else:
        raise AssertionError("the step ended")
    assert torch.equal(flat(trainer.model), before)


def validation_of(data: object, length: int, at_once: int, rank: int, size: int, limit: int) -> Iterator[Batch]:
    """In place of a data set: two global batches, of which each reader has every `size`-th sequence."""
    inputs, targets = (torch.cat(each) for each in zip(global_batch(7, True), global_batch(8, True), strict=True))
    inputs, targets = inputs[rank::size], targets[rank::size]
    for index, parts in enumerate(zip(inputs.split(at_once), targets.split(at_once), strict=True)):
        yield Batch(index, *parts)


@check(sizes=[2, 4], schedule=["1f1b", "interleaved"])
def check_validation(comm: Communicator, schedule: str) -> None:
    """Loss, accuracy and number of tokens are those of the whole model; all ranks have them."""
    config = pipeline_config(schedule)
    trainer, plain = make_trainer(comm, config), make_plain_model(config)
    with patch("hvdlm.training.evaluation.validation_batches", validation_of):
        shards = [SimpleNamespace(n_tokens=1, n_bytes=1)]
        data = SimpleNamespace(eos_id=0, validates_sources=False, validation=SimpleNamespace(shards=shards))
        ways = {"readers": trainer.readers, "pipeline": trainer.pipeline}
        result = evaluate(trainer.model, data, comm, 2, **ways)  # type: ignore[arg-type]
        stopped = evaluate(trainer.model, data, comm, 2, stop_requested=lambda: comm.rank == 1, **ways)  # type: ignore[arg-type]
    assert stopped is None
    inputs, targets = (torch.cat(each) for each in zip(global_batch(7, True), global_batch(8, True), strict=True))
    assert inputs.shape == (2 * SEQUENCES, LENGTH)
    with torch.no_grad():
        logits = functional.linear(plain(inputs), plain.output_weight).reshape(-1, VOCABULARY)
    expected = functional.cross_entropy(logits, targets.reshape(-1), ignore_index=-100)
    assert result is not None
    assert result.tokens == int((targets != -100).sum())
    assert abs(result.loss / float(expected) - 1) <= 1e-6
    counted = targets.reshape(-1) != -100
    assert result.accuracy == float((logits.argmax(1) == targets.reshape(-1))[counted].double().mean())
    assert trainer.model.training
