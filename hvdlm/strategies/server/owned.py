"""What one server keeps: its part of all parameters, of the optimizer's state, and of the sums of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.held_parts import HeldParts, Runs
from hvdlm.strategies.optimizer import named_state, set_learning_rate
from hvdlm.strategies.penalties import add_penalties_
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.server.parts import flat, in_order_of_reading, make_buckets, make_codecs, pieces_of_state
from hvdlm.strategies.server.served_optimizer import make_served_optimizer, served_state_kinds
from hvdlm.strategies.sharded.partition import free
from hvdlm.strategies.update_loops import add_scaled_


class OwnedParameters:
    """Float32 parameters by bucket, and the optimizer over them."""

    def __init__(self, model: Transformer, config: Config, group: ServerGroup) -> None:
        """`model`: names and shapes, and the dtype of its products. All is zero until it is loaded."""
        self._servers, self._server = group.servers, group.own_server
        self._is_local = bool(config.local_steps.every)  # workers push differences of parameters
        self._settings, self._outer_lr = config.optimizer, config.local_steps.lr
        self._buckets = make_buckets(model, config, group)
        self._codecs = make_codecs(self._buckets, config)
        self.order = in_order_of_reading(model, self._buckets)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._shapes, self._kinds = shapes, served_state_kinds(config, shapes)
        self._sums: list[Tensor] = []
        self._before: list[Tensor] = []  # parameters by bucket, before the last step; none if nothing is predicted
        self._pieces: dict[str, nn.Parameter] = {}
        for bucket, codec in zip(self._buckets, self._codecs, strict=True):
            partition = bucket.partition
            self._sums.append(torch.zeros_like(partition.master))
            if config.server.predict:
                self._before.append(torch.zeros_like(partition.master))
            for name, piece in partition.pieces.items():
                self._pieces[name] = nn.Parameter(partition.master[piece.span])
                self._pieces[name].grad = self._sums[-1][piece.span]
            # Of a whole bucket; a server has a part of it, and nothing that it has not delivered
            for unused in (partition.buffer, partition.weights, *codec.state().values()):
                free(unused)
        self._decaying = [piece for name, piece in self._pieces.items() if len(shapes[name]) >= 2]
        others = [piece for name, piece in self._pieces.items() if len(shapes[name]) < 2]
        self._optimizer = make_served_optimizer(self._decaying, others, config)
        self._state = named_state(self._optimizer, self._pieces)

    @property
    def buckets(self) -> int:
        return len(self._buckets)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What this server keeps of each parameter, flat, by name."""
        return {name: piece.data for name, piece in self._pieces.items()}

    def fill(self, name: str, values: Tensor) -> None:
        """Takes over what this server keeps of a parameter. `values`: all of it."""
        for bucket in self._buckets:
            bucket.partition.load(name, values)

    def held_parts(self) -> HeldParts:
        """Which parts of parameters and of `state` these are."""
        runs: dict[str, Runs] = {
            name: [(piece.start, piece.stop)]
            for bucket in self._buckets
            for name, piece in bucket.partition.pieces.items()
        }
        return HeldParts(self._shapes, runs, self._kinds, frozenset(runs))

    def gather_into(self, parameters: Mapping[str, Tensor], servers: Communicator) -> None:
        """Fills the whole model with what each of the `servers` keeps of it. Collective."""
        for bucket in self._buckets:
            partition = bucket.partition
            whole = torch.empty(len(partition.master) * servers.size)
            servers.all_gather_into(whole, partition.master)
            for name, values in zip(partition.names, partition.split(whole), strict=True):
                parameters[name].copy_(values)

    @property
    def state(self) -> dict[str, Tensor]:
        """What the optimizer keeps of them, as `named_state` names it."""
        return self._state

    # ---- one step

    def zero_grad(self) -> None:
        for each in self._sums:
            each.zero_()

    def add(self, bucket: int, message: Tensor, step: int) -> None:
        """Adds to the sums what a worker has pushed of a bucket, (n,) uint8; parameters move along differences.

        `step`: as the worker's codec has counted it.
        """
        codec, total = self._codecs[bucket], self._sums[bucket]
        if not self._is_local:
            codec.add_message_(message, total, self._server, self._servers, step)
            return
        difference = torch.zeros_like(total)
        codec.add_message_(message, difference, self._server, self._servers, step)
        total.add_(difference)
        add_scaled_(self._buckets[bucket].partition.master, difference, self._outer_lr)

    def add_own(self, pushed: Mapping[str, Tensor]) -> None:
        """The same for what this process has made itself: of whole parameters, by name, it takes what it keeps."""
        for partition in (each.partition for each in self._buckets):
            for name, part in partition.pieces.items():
                if name not in pushed:  # of a share without sequences
                    continue
                piece, own = self._pieces[name], pushed[name].reshape(-1)[part.start : part.stop]
                assert piece.grad is not None
                piece.grad.add_(own)
                if self._is_local:
                    add_scaled_(piece.data, own, self._outer_lr)

    def scale_(self, factor: float) -> None:
        """Multiplies the sums."""
        for each in self._sums if factor != 1 else ():
            each.mul_(factor)

    def norm(self) -> float:
        """Euclidean norm of the sums."""
        return math.sqrt(math.fsum(float(torch.linalg.vector_norm(each)) ** 2 for each in self._sums))

    def step(self, factor: float, rate: float) -> None:
        """The optimizer's step on `factor` times the sums, with learning rate `rate`."""
        self.scale_(factor)
        if not self._is_local:
            add_penalties_(self._decaying, self._settings)
        set_learning_rate(self._optimizer, rate)
        for number, before in enumerate(self._before):
            before.copy_(self._buckets[number].partition.master)
        self._optimizer.step()

    # ---- as messages

    def weights(self, bucket: int, ahead: float = 0.0) -> Tensor:
        """The parameters of a bucket as workers get them, `ahead` steps from now if each of these were the last one
        again: linear weight prediction (Kosson et al., "Pipelined Backpropagation at Scale", MLSys 2021, section 3.2).
        """
        own = self._buckets[bucket]
        weights = own.partition.master
        if ahead:
            weights = (weights - self._before[bucket]).mul_(ahead).add_(weights)
        return weights.to(own.pulled_as)

    def kept(self, bucket: int, is_state: bool) -> Tensor:
        """The parameters of a bucket, or all the optimizer keeps of them, float32."""
        return flat(self._state_of(bucket)) if is_state else self._buckets[bucket].partition.master

    def load(self, bucket: int, is_state: bool, message: Tensor) -> None:
        """Takes over what `kept` of this server, in another run perhaps, has returned."""
        into = self._state_of(bucket) if is_state else [self._buckets[bucket].partition.master]
        numbers = message.view(torch.float32).split([each.numel() for each in into])
        for tensor, values in zip(into, numbers, strict=True):
            tensor.copy_(values.view_as(tensor))
        if self._before and not is_state:
            self._before[bucket].copy_(into[0])  # no step is known that could be made again

    def _state_of(self, bucket: int) -> list[Tensor]:
        pieces = pieces_of_state(self._buckets[bucket].partition, self._server, self._kinds)
        return [self._state[name] for name, _, _ in pieces]
