"""`[server]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from hvdlm.arguments import host_and_port
from hvdlm.config.section import Section, UserPath, check_address, check_listen

if TYPE_CHECKING:
    from hvdlm.config import Config

# Of a batch, where workers come and go and nobody has said how many
_SHARES_OF_A_PROCESS = 4


class ServerSection(Section):
    """`[server]`: parameter servers, to which the other ranks, the workers, push gradients."""

    ranks: int = Field(
        0, ge=0, description="the last ranks of the job that are servers, among which parameters are divided; 0: none"
    )
    pull: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="numbers by which workers get parameters; those that products with train.precision = 'bf16' round "
        "anyway always come in 16 bits, unless workers make local steps",
    )

    max_staleness: int = Field(
        0,
        ge=0,
        description="0: all workers train on their part of each batch, and wait for one another; otherwise each trains "
        "at its own pace on what the first server hands out, and gradients of parameters that are more steps old, or "
        "with local_steps.every more rounds, do not count, and are made again",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="with max_staleness, first steps of a run in which a batch is handed out when all steps before are "
        "made, so that no gradient is late",
    )
    predict: bool = Field(
        False,
        description="with max_staleness, a worker gets parameters as they would be when its gradients arrive, if each "
        "step until then were the last one again",
    )
    shares: int = Field(
        0,
        ge=0,
        description="with max_staleness, the parts of a batch that are handed out, each to one worker; 0: as many as "
        f"there are workers at the start, or {_SHARES_OF_A_PROCESS} with listen",
    )

    listen: Annotated[str, AfterValidator(check_listen)] = Field(
        "",
        description="HOST:PORT where `hvdlm serve`, a server that is a process of its own, waits for workers; several: "
        "number k at PORT + k, from 0 on; 0.0.0.0: on all IPv4 addresses of the host; port 0: one that is free",
    )
    address: Annotated[str, AfterValidator(check_address)] = Field(
        "", description="HOST:PORT of such a server, whose worker `hvdlm train` then is"
    )
    token_file: UserPath = Field(
        "",
        description="a copy of `token` in that server's run directory; empty: the token is in the environment, as "
        "HVDLM_SERVER_TOKEN",
    )

    @property
    def is_used(self) -> bool:
        """Whether gradients go to servers, or differences of parameters."""
        return self.ranks > 0 or self.is_process

    @property
    def is_process(self) -> bool:
        """Whether a server is a process of its own."""
        return bool(self.listen or self.address)

    @property
    def is_asynchronous(self) -> bool:
        """Whether workers do not wait for one another."""
        return self.max_staleness > 0 or self.is_process

    @property
    def shares_of_a_process(self) -> int:
        """The shares of a batch that a server hands out which is a process of its own."""
        return self.shares or _SHARES_OF_A_PROCESS

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of `address`, or of `listen`."""
        return host_and_port(self.address or self.listen)


def server_misfits(config: Config) -> dict[str, bool]:
    """Sentences, and whether they are true of the settings."""
    server, train, algorithm = config.server, config.train, config.optimizer.algorithm
    codec, is_process = config.compression.codec, server.is_process
    is_used, is_asynchronous = server.is_used, server.is_asynchronous
    is_local = is_used and bool(config.local_steps.every)
    name = f"server.{'address' if server.address else 'listen' if server.listen else 'ranks'}"
    without_waiting = f"with {name if is_process else 'server.max_staleness'}"
    return {
        "server.ranks are servers among the ranks of a job, server.listen and server.address are of processes of their "
        "own: set one of them": server.ranks > 0 and is_process,
        "workers of server.listen do not wait for one another: set server.max_staleness, how many steps late their "
        "gradients may be, above 0": bool(server.listen) and not server.address and not server.max_staleness,
        "server.pull = 'bf16' is how servers send parameters: set server.ranks with it, or server.listen": (
            server.pull != "fp32" and not is_used
        ),
        "local_steps.every with servers is of workers that do not wait for one another: set server.max_staleness above "
        "0 with it, or leave out server.ranks": is_local and not is_asynchronous,
        f"local_steps.every = 'auto' measures an average of all ranks: with {name} set it to a number": (
            is_local and config.local_steps.every == "auto"
        ),
        f"of [local_steps] every, lr and momentum go with {name}: leave out {', '.join(_without_servers(config))}": (
            is_local and bool(_without_servers(config))
        ),
        "server.predict follows from the last gradient step, and is not tried with local_steps.every: leave it out": (
            is_local and server.predict
        ),
        f"{name} needs the whole model on every worker: it does not go with [parallel]": (
            is_used and config.parallel.is_used
        ),
        f"{name} does not go with comm.elastic = true: leave out one of them": is_used and config.comm.elastic,
        f"optimizer.algorithm = {algorithm!r} needs whole matrices, which servers divide among them: set it to adamw, "
        f"adam, sgd or lion with {name}": is_used and not is_local and algorithm in ("muon", "dion"),
        "server.max_staleness is how old gradients may be that reach servers: set server.ranks with it, or "
        "server.listen": server.max_staleness > 0 and not is_used,
        "server.predict and server.warmup_steps are for gradients that are late: set server.max_staleness with them": (
            (server.predict or server.warmup_steps > 0) and not is_asynchronous
        ),
        "server.shares are handed out to workers that do not wait for one another: set server.max_staleness with it": (
            server.shares > 0 and not is_asynchronous
        ),
        "train.max_time, train.patience and train.evaluate_tasks need workers that meet after every step: "
        f"{without_waiting} leave them out": is_asynchronous
        and (bool(train.max_time) or train.patience > 0 or bool(train.evaluate_tasks)),
        f"train.balance = true deals out parts of a batch, of which {without_waiting} a fast worker gets more anyway: "
        "leave it out": is_asynchronous and train.balance,
        "data.on_corrupt = 'skip' is not counted by workers that do not meet: set it to 'fail' "
        f"{without_waiting}": is_asynchronous and config.data.on_corrupt == "skip",
        no_messages_to_owners(codec, name): is_used and codec == "auto",
        "compression.hierarchical = true sums gradients within a node, which workers send to servers: leave it out "
        f"with {name}": is_used and config.compression.hierarchical,
        f"train.precision = 'fp16' changes the scale of the loss: with {name} set it to bf16 or fp32": (
            is_used and train.precision == "fp16"
        ),
        f"train.heal_replicas needs another rank with the same optimizer state: it does not go with {name}": (
            is_used and train.heal_replicas
        ),
        "train.ema averages the parameters of each step, which workers have only in part when it ends: it does not go "
        f"with {name}": is_used and train.ema > 0,
    }


def _without_servers(config: Config) -> list[str]:
    """Settings of `[local_steps]` that are of ranks which average among them."""
    local_steps = config.local_steps
    fields = type(local_steps).model_fields
    usual = {name: field.default for name, field in fields.items() if name not in ("every", "lr", "momentum")}
    return [f"local_steps.{name}" for name, default in usual.items() if getattr(local_steps, name) != default]


def no_workers(servers: int, ranks: int) -> str:
    """What is to be said where no rank is left to train."""
    return (
        f"server.ranks = {servers} of {ranks} rank{'s' if ranks > 1 else ''} leaves none to train: start more ranks, "
        "or fewer servers"
    )


def no_messages_to_owners(codec: str, name: str = "server.ranks") -> str:
    """What is to be said of a codec that cannot send gradients to ranks which have none of their own, as the setting
    `name` asks for.
    """
    return (
        f"compression.codec = {codec!r} cannot send gradients to servers: with {name} set it to none, fp16, bf16, "
        "int8, int4, int2, topk, topk2 or powersgd"
    )
