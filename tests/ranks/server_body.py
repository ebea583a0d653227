"""Mailboxes, and parameter servers against plain PyTorch on the joined batch, with plain SGD."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from checks import check
from commands import infinite_gradient
from torch import Tensor, nn
from training_body import CPU, RATE, VOCABULARY, Batches, Records, flat, make_config, make_plain_model, plain_loss

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mailbox import Letter, open_mailbox
from hvdlm.config import Config
from hvdlm.errors import JobError
from hvdlm.strategies.server.group import ServerGroup, join_server_group
from hvdlm.training.serving import serve
from hvdlm.training.trainer import Trainer

TIMEOUT = 60.0


def number_of(source: int, destination: int, count: int) -> Tensor:
    """Of all lengths from nothing to 1 MB, as float32."""
    return torch.full((count**4 * 17,), float(100 * source + 10 * destination + count))


@check(sizes=[1, 2, 3, 4])
def check_letters_from_all_to_all(comm: Communicator) -> None:
    """Each arrives once, in the order of its source, whatever comes from others; what was posted may change."""
    mailbox = open_mailbox(comm, TIMEOUT)
    counts = 12
    for count in range(counts):
        for destination in range(comm.size):
            data = number_of(comm.rank, destination, count)
            mailbox.post([destination], (7, count, -1), data)
            data.fill_(-1)
    received: dict[int, list[Letter]] = {source: [] for source in range(comm.size)}
    for _ in range(counts * comm.size):
        letter = mailbox.receive("letters", range(comm.size))
        received[letter.source].append(letter)
    for source, letters in received.items():
        assert [letter.header for letter in letters] == [(7, count, -1, 0) for count in range(counts)]
        for count, letter in enumerate(letters):
            assert letter.data.view(torch.float32).equal(number_of(source, comm.rank, count))
    assert mailbox.take() is None
    comm.barrier()
    mailbox.close()


def served_config(codec: str, servers: int, clip_norm: float = 0.3) -> Config:
    config = make_config("fp32", clip_norm, codec)
    settings = config.model_dump()
    settings["optimizer"].update(algorithm="sgd", momentum=0.0, weight_decay=0.0)
    settings["server"].update(ranks=servers)
    return Config.model_validate(settings)


def worker(comm: Communicator, config: Config) -> tuple[ServerGroup, Trainer | None]:
    """The trainer of a worker; a server has served when this returns."""
    group, alike = join_server_group(comm, config, CPU)
    if group.is_server:
        assert serve(group, config, VOCABULARY, alike, lambda: False) == 3
        return group, None
    trainer = Trainer(config, alike, SimpleNamespace(eos_id=0), VOCABULARY, CPU, group)  # type: ignore[arg-type]
    trainer.metrics = Records()  # type: ignore[assignment]
    trainer.start()
    return group, trainer


@check(sizes=[2, 3, 4], servers=[1, 2])
def check_steps_against_plain_pytorch(comm: Communicator, servers: int) -> None:
    """SGD, clipped by the norm of all gradients; step 3 of 6 has an infinite gradient, and is left out."""
    if servers >= comm.size:
        return
    config = served_config("none", servers)
    group, trainer = worker(comm, config)
    if trainer is not None:
        batches, plain = Batches(trainer.communicator, 0, False), make_plain_model(config)
        optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
        begin = flat(plain)
        for step in range(6):
            overflows = step == 3 and trainer.communicator.rank == trainer.communicator.size - 1
            with infinite_gradient(trainer.model) if overflows else nullcontext():
                trainer.train_step(batches, False)  # type: ignore[arg-type]
            trainer.strategy.arrive()
            if step != 3:
                optimizer.zero_grad()
                plain_loss(plain, step, ignored=False).backward()
                nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
                optimizer.step()
            moved, expected = flat(trainer.model) - begin, flat(plain) - begin
            assert (moved - expected).norm() <= 1e-5 * expected.norm(), step
            mine = flat(trainer.model)
            assert all(mine.equal(other) for other in trainer.communicator.all_gather(mine))
        (said,) = trainer.metrics.events  # type: ignore[union-attr]
        assert said.startswith("step 4 is left out: ") and "is not finite" in said
        group.end(3, trainer.communicator)
    comm.barrier()


@check(sizes=[3], codec=["bf16", "int8", "int4", "int2", "topk", "powersgd"])
def check_nothing_is_lost(comm: Communicator, codec: str) -> None:
    """What SGD has applied and what residuals hold are together the gradients of all steps that were not left out."""
    config = served_config(codec, servers=1, clip_norm=0.0)
    group, trainer = worker(comm, config)
    if trainer is not None:
        batches, plain = Batches(trainer.communicator, 0, False), make_plain_model(config)
        begin, gradients = flat(trainer.model), torch.zeros_like(flat(trainer.model))
        for step in range(6):
            before = flat(trainer.model)
            overflows = step == 3 and trainer.communicator.rank == 1
            with infinite_gradient(trainer.model) if overflows else nullcontext():
                trainer.train_step(batches, False)  # type: ignore[arg-type]
            trainer.strategy.arrive()
            assert flat(trainer.model).equal(before) == (step == 3)
            if step != 3:
                nn.utils.vector_to_parameters(before, plain.parameters())
                plain.zero_grad()
                plain_loss(plain, step, ignored=False).backward()
                gradients += torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])  # type: ignore
        state = trainer.strategy.step_state()
        own = torch.cat([state[f"residual.{name}"].flatten() for name in trainer.parameters])
        residual = trainer.communicator.all_gather(own).sum(0)
        lost = (begin - flat(trainer.model)) / RATE + residual - gradients
        assert residual.norm() > 1e-4 * gradients.norm()
        assert lost.norm() <= 1e-5 * gradients.norm() + 0.01 * residual.norm(), (lost.norm(), residual.norm())
        group.end(3, trainer.communicator)
    comm.barrier()


@check(sizes=[2])
def check_what_is_refused(comm: Communicator) -> None:
    config = served_config("none", servers=2)
    try:
        join_server_group(comm, config, CPU)
    except JobError as error:
        assert "server.ranks = 2 of 2 ranks leaves none to train" in str(error)
    else:
        raise AssertionError("no rank is left")
