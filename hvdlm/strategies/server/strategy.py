"""Workers push gradients to parameter servers, which step by their sum, and pull parameters from them.

Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014; with servers that each have a
part of every bucket, as in BytePS (Jiang et al., OSDI 2020). The curve is that of `EveryStep`: all gradients of a step
are added, and clipped by the norm of all of them. Gradients leave while the backward pass makes others, and parameters
come while the next forward pass computes with those that are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mailbox import Letter
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.config.server import no_messages_to_owners
from hvdlm.errors import JobError
from hvdlm.gradients.bucket_codecs import codec_state, flat_states
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.sync import Traffic, traffic_of
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.server.exchange import PushedCodec, ServerExchange
from hvdlm.strategies.server.group import NONE, Kind, ServerGroup, ServerLetters
from hvdlm.strategies.server.parts import compute_with, flat, make_buckets, make_codecs, pieces_of_state
from hvdlm.strategies.server.served_optimizer import served_state_kinds
from hvdlm.strategies.sharded.gradients import ShardedGradients
from hvdlm.strategies.sharded.parameters import ShardedParameters
from hvdlm.strategies.sharded.partitions import readers_of
from hvdlm.strategies.step_agreement import StepAgreement
from hvdlm.strategies.strategy import RankState, Report, StepEnd, Strategy


class Done(NamedTuple):
    """A task that a worker has trained on."""

    task: int
    version: int  # of the parameters
    loss: float  # sum over tokens
    tokens: int


class ServedWorker(Strategy):
    """A worker, which keeps no optimizer state. The first one speaks for all where servers need to be told once."""

    def __init__(self, model: Transformer, workers: Communicator, group: ServerGroup, config: Config) -> None:
        """Takes over the parameters of `model` and their `.grad`. Collective among workers."""
        self.communicator, self._group = workers, group
        self._parameters = dict(model.named_parameters())
        shapes = {name: tuple(each.shape) for name, each in self._parameters.items()}
        self._kinds = served_state_kinds(config, shapes)
        self._buckets = make_buckets(model, config, group)
        self._partitions = [each.partition for each in self._buckets]
        codecs = make_codecs(self._buckets, config)
        if not codecs[0].has_messages_to_owners:
            raise JobError(no_messages_to_owners(config.compression.codec))
        for bucket in self._buckets:
            compute_with(bucket)
        self._letters = ServerLetters(group)
        self._exchange = ServerExchange(workers, group, self._letters, self._buckets)
        device = self._partitions[0].buffer.device
        self._channel = Channel(workers, None, self._exchange, device, owns_communicator=False)
        self._codecs: list[Codec] = [PushedCodec(number, codec) for number, codec in enumerate(codecs)]
        self._gradients = ShardedGradients(self._partitions, self._codecs, [self._channel], (), keeps_whole=True)
        self._weights = ShardedParameters(readers_of(model, self._partitions), [self._channel])
        model.parameter_access = self._weights
        self._agreement = StepAgreement()
        self._factor, self._has_norms, self._has_applied, self._stops = 1.0, False, False, False
        self._state: dict[str, Tensor] = {}  # whole tensors of the optimizer's state, for a while
        self._masters: dict[str, Tensor] = {}  # the parameters that are saved, where workers have them rounded
        self._has_pulled = False  # before that there is nothing to wait for
        self._count_traffic()

    @property
    def _speaks(self) -> bool:
        return self.communicator.rank == 0

    # ---- one step

    def begin_step(self, own: Report) -> Work[int]:
        totals = self._agreement.begin(self.communicator, own._replace(stop=own.stop or self._stops))
        self._gradients.begin_step()
        self._factor, self._has_norms, self._has_applied = 1.0, False, False
        return totals

    def set_last_micro_batch(self) -> None:
        self._gradients.set_last_micro_batch()

    def wait(self) -> None:
        self._gradients.wait()
        self.arrive()  # on a rank that has made no pass
        self._count_traffic()

    def synchronize(self) -> None:
        pass  # gradients are on the CPU

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def _count_traffic(self) -> None:
        size = self.communicator.size
        dense = sum(2 * (size - 1) * each.buffer.nbytes // size for each in self._partitions)
        self._traffic = traffic_of(self.channels, dense)
        self._channel.reset_counters()

    def norm(self) -> Tensor:
        squares = []
        for server in range(self._group.servers):
            letter = self._letters.expect(server, Kind.NORM)
            self._stops |= bool(letter.header[1])
            squares.append(float(letter.data.view(torch.float64)) ** 2)
        self._has_norms = True
        norm = torch.tensor(math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan)
        self._gradients.keep_residuals_if(norm.isfinite())
        return norm

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("of ranks that go on when another has died, which these do not")

    @property
    def channels(self) -> list[Channel]:
        return [self._channel]

    def scale_(self, factor: float | Tensor) -> None:
        self._factor *= float(factor)

    def scale_residuals_(self, factor: float) -> None:
        for kept in self.residuals() if factor != 1 else ():
            kept.mul_(factor)

    def leave_out_if(self, found: Tensor) -> bool:
        return False

    def apply(self, rate: float) -> None:
        if self._speaks:
            numbers = torch.tensor([self._factor, rate], dtype=torch.float64)
            header = (Kind.APPLY, self._gradients.step - 1)
            self._group.mailbox.post(self._group.server_ranks, header, numbers)
        self._pull()
        self._has_applied = True

    def end_step(self) -> StepEnd:
        if self._has_norms and not self._has_applied and self._speaks:
            self._letters.tell((Kind.SKIP, self._gradients.step - 1))
        return self._agreement.end()

    def arrive(self) -> None:
        if self._has_pulled:
            self._weights.wait()

    def _pull(self) -> None:
        """Servers are about to send parameters."""
        self._weights.publish()
        self._has_pulled = True

    def finish(self) -> int:
        return 0

    def close(self) -> None:
        self.arrive()
        self._channel.close()

    # ---- asynchronous training, which has no steps that workers have in common

    def ask(self, done: Done | None, is_stop_requested: bool) -> Letter:
        """Tells the first server what this worker has done, and returns its answer: a TASK or a BOUNDARY, with
        parameters that are then on their way; or the END of a server that is a process of its own.
        """
        header, numbers = (Kind.DONE, NONE, NONE, int(is_stop_requested)), torch.empty(0)
        if done is not None:
            header = (Kind.DONE, done.task, done.version, int(is_stop_requested))
            numbers = torch.tensor([done.loss, done.tokens], dtype=torch.float64)
        self.arrive()
        self._group.mailbox.post(self._group.server_ranks[:1], header, numbers)
        answer = self._letters.expect(0, Kind.TASK, Kind.BOUNDARY, Kind.END)
        if answer.kind != Kind.END:
            self._pull()
        return answer

    def leave(self) -> None:
        """Tells servers that are processes of their own that this worker does not do what it may have been given."""
        self._group.mailbox.post(self._group.server_ranks[:1], (Kind.DONE, NONE, NONE, 1))

    def begin_task(self, task: int, round_: int) -> None:
        """What is pushed from now on, by the hooks of a step, is of this task, of a round of this number."""
        self._gradients.begin_step()
        self._gradients.step, self._exchange.task = round_, task

    def end_task(self) -> None:
        """Returns when all gradients are on their way. Those that are not finite leave no residual."""
        self._gradients.wait()
        is_finite = all(bool(kept.isfinite().all()) for kept in self.residuals())
        self._gradients.keep_residuals_if(torch.tensor(is_finite))
        self._count_traffic()

    def meet(self, step: int) -> None:
        """All workers have come to a boundary after so many steps."""
        self._gradients.step = step

    # ---- after a rank has died, which ends the job unless workers do not wait for one another

    def abandon(self) -> None:
        self._channel.abandon()

    def release(self) -> None:
        self._gradients.release()

    def step_state(self) -> dict[str, Tensor]:
        return codec_state(self._partitions, self._codecs)

    def residuals(self) -> list[Tensor]:
        return flat_states(self._codecs)

    # ---- the parameters to keep, and state

    @property
    def ranks_are_equal(self) -> bool:
        return True

    def parameters(self) -> dict[str, Tensor]:
        self.arrive()
        return dict(self._parameters)

    def saved_parameters(self) -> dict[str, Tensor]:
        if all(each.pulled_as == torch.float32 for each in self._buckets):
            return self.parameters()
        if not self._masters:
            self._masters = {name: torch.empty_like(each) for name, each in self._parameters.items()}
        for server, number, numbers in self._ask_for(is_state=False):
            partition = self._partitions[number]
            for name, piece in partition.pieces_of(server).items():
                self._masters[name].view(-1)[piece.start : piece.stop] = numbers[piece.span]
        return self._masters

    def replaced(self, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        raise NotImplementedError("of an average of parameters, which workers do not keep")

    @torch.no_grad()
    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        for name, values in parameters or ():
            self._parameters[name].copy_(values)
        broadcast_tensors(self.communicator, self._parameters.values())
        self._load()

    def log_numbers(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": {"step": self._gradients.step, "trials": [], "ranks": self.communicator.size}}

    def load_state_dict(self, state: dict[str, Any], step: int, as_saved: bool) -> None:
        self._gradients.step = state["gradients"]["step"]

    def optimizer_state(self) -> dict[str, Tensor]:
        """On the first worker, what the servers have; on others the same tensors, for a checkpoint to be read."""
        if not self._state:
            for name, parameter in self._parameters.items():
                for kind in self._kinds[name]:
                    self._state[f"{kind}.{name}"] = torch.zeros(()) if kind == "step" else torch.zeros_like(parameter)
        if self._speaks:
            for server, number, numbers in self._ask_for(is_state=True):
                position = 0
                for name, span, is_count in pieces_of_state(self._partitions[number], server, self._kinds):
                    length = 1 if is_count else span.stop - span.start
                    self._state[name].view(-1)[span] = numbers[position : position + length]
                    position += length
        return {name: each.detach() for name, each in self._state.items()}

    def rank_state(self) -> RankState:
        self._gradients.take_back()  # in case of a step that a rank could not read its part of
        return RankState(summed=self.step_state())

    def restored(self, residual_factor: float) -> None:
        self.scale_residuals_(residual_factor)
        self._load()

    # ---- letters about all that servers keep

    def _load(self) -> None:
        """Servers take over this model's parameters, and the optimizer's state if it has been read; workers then get
        what they compute with.
        """
        if self._speaks:
            for number, partition in enumerate(self._partitions):
                for server, rank in enumerate(self._group.server_ranks):
                    part = partition.weights.split(len(partition.weights) // self._group.servers)[server]
                    self._group.mailbox.post([rank], (Kind.LOAD, number, 0), part)
                    if self._state:
                        pieces = pieces_of_state(partition, server, self._kinds)
                        state = flat([self._state[name].view(-1)[span] for name, span, _ in pieces])
                        self._group.mailbox.post([rank], (Kind.LOAD, number, 1), state)
                self._group.mailbox.flush()
            self._letters.tell((Kind.PUBLISH, self._gradients.step))
        self._state = {}
        self._pull()

    def _ask_for(self, is_state: bool) -> Iterable[tuple[int, int, Tensor]]:
        """What servers keep: of each server and bucket the numbers, float32."""
        self.arrive()
        self._letters.tell((Kind.GIVE, int(is_state)))
        for server in range(self._group.servers):
            for number in range(len(self._partitions)):
                yield server, number, self._letters.expect(server, Kind.KEPT, number=number).data.view(torch.float32)
