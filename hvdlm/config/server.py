"""`[server]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hvdlm.config.section import Section

if TYPE_CHECKING:
    from hvdlm.config import Config


class ServerSection(Section):
    """`[server]`: parameter servers, to which the other ranks, the workers, push gradients."""

    ranks: int = Field(
        0, ge=0, description="the last ranks of the job that are servers, among which parameters are divided; 0: none"
    )
    pull: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="numbers by which workers get parameters; those that products with train.precision = 'bf16' round "
        "anyway always come in 16 bits",
    )

    max_staleness: int = Field(
        0,
        ge=0,
        description="0: all workers train on their part of each batch, and wait for one another; otherwise each trains "
        "at its own pace on what the first server hands out, and gradients of parameters that are more steps old do "
        "not count, and are made again",
    )
    weigh_by_age: bool = Field(
        False, description="with max_staleness, gradients that are n steps old count 1 / n times"
    )


def server_misfits(config: Config) -> dict[str, bool]:
    """Sentences, and whether they are true of the settings."""
    server, train, algorithm = config.server, config.train, config.optimizer.algorithm
    codec, is_used = config.compression.codec, config.server.ranks > 0
    is_asynchronous = server.max_staleness > 0
    return {
        "server.pull = 'bf16' is how servers send parameters: set server.ranks with it": (
            server.pull != "fp32" and not is_used
        ),
        "server.ranks and local_steps.every are two ways for ranks to combine their work: set one of them": (
            is_used and bool(config.local_steps.every)
        ),
        "server.ranks needs the whole model on every worker: it does not go with [parallel]": (
            is_used and config.parallel.is_used
        ),
        "server.ranks does not go with comm.elastic = true: leave out one of them": is_used and config.comm.elastic,
        f"optimizer.algorithm = {algorithm!r} needs whole matrices, which servers divide among them: set it to adamw, "
        "adam, sgd or lion with server.ranks": is_used and algorithm in ("muon", "dion"),
        "server.max_staleness is how old gradients may be that reach servers: set server.ranks with it": (
            is_asynchronous and not is_used
        ),
        "server.weigh_by_age is for gradients that are late: set server.max_staleness with it": (
            server.weigh_by_age and not is_asynchronous
        ),
        "train.max_time, train.patience and train.evaluate_tasks need workers that meet after every step: with "
        "server.max_staleness leave them out": is_asynchronous
        and (bool(train.max_time) or train.patience > 0 or bool(train.evaluate_tasks)),
        "train.balance = true deals out parts of a batch, of which with server.max_staleness a fast worker gets more "
        "anyway: leave it out": is_asynchronous and train.balance,
        "data.on_corrupt = 'skip' is not counted by workers that do not meet: set it to 'fail' with "
        "server.max_staleness": is_asynchronous and config.data.on_corrupt == "skip",
        no_messages_to_owners(codec): is_used and codec in ("auto", "topk", "topk2", "powersgd"),
        "compression.hierarchical = true sums gradients within a node, which workers send to servers: leave it out "
        "with server.ranks": is_used and config.compression.hierarchical,
        "train.precision = 'fp16' changes the scale of the loss: with server.ranks set it to bf16 or fp32": (
            is_used and train.precision == "fp16"
        ),
        "train.heal_replicas needs another rank with the same optimizer state: it does not go with server.ranks": (
            is_used and train.heal_replicas
        ),
        "train.ema averages the parameters of each step, which workers have only in part when it ends: it does not go "
        "with server.ranks": is_used and train.ema > 0,
    }


def no_workers(servers: int, ranks: int) -> str:
    """What is to be said where no rank is left to train."""
    return (
        f"server.ranks = {servers} of {ranks} rank{'s' if ranks > 1 else ''} leaves none to train: start more ranks, "
        "or fewer servers"
    )


def no_messages_to_owners(codec: str) -> str:
    """What is to be said of a codec that cannot send gradients to ranks which have none of their own."""
    return (
        f"compression.codec = {codec!r} cannot send gradients to servers: with server.ranks set it to none, fp16, "
        "bf16, int8, int4 or int2"
    )
