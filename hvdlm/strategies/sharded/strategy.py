"""Ranks divide the optimizer's state (stage 1), the gradients (2) and the parameters (3) among them.

ZeRO (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, section 5).
The curve is that of `EveryStep`: gradients are summed over all ranks, each number at its owner, which steps it; weights
are gathered from their owners, in the dtype in which products are computed, of which `EveryStep` makes the same copies.
Muon's matrices are stepped by their owners, too, who have momentum orthogonalised by a rank that is sent all of it.
Where several groups of ranks hold a copy of the model each, sums go on from owner to owner of the copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.comm.mesh import Mesh
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.config.parallel_misfits import no_half_for_owners
from hvdlm.errors import JobError
from hvdlm.gradients.bucket_codecs import codec_state, flat_states
from hvdlm.gradients.channel import Channel, open_channels
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import bucket_bytes, codec_factory
from hvdlm.gradients.norm import norm_of_parts
from hvdlm.gradients.sync import Traffic, traffic_of
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.held_parts import HeldParts, Runs
from hvdlm.strategies.hidden_matrices import is_hidden_matrix
from hvdlm.strategies.model_part import ModelPart, runs_within
from hvdlm.strategies.muon.slices import SlicedMatrices, SlicedMatrix
from hvdlm.strategies.optimizer import (
    leave_out_if,
    make_optimizer_of,
    named_state,
    set_learning_rate,
    state_kinds,
)
from hvdlm.strategies.penalties import add_penalties_
from hvdlm.strategies.sharded.gradients import ShardedGradients
from hvdlm.strategies.sharded.parameters import ShardedParameters
from hvdlm.strategies.sharded.partitions import make_partitions, readers_of
from hvdlm.strategies.sharded.rounded_weights import RoundedWeights
from hvdlm.strategies.step_agreement import StepAgreement
from hvdlm.strategies.strategy import RankState, Report, StepEnd, Strategy

# Bits of a number by `compression.weights`
WEIGHT_BITS = {"int8": 8, "int4": 4, "int2": 2}

# The kind of state that weights are which all ranks have
_GATHERED = "gathered"


class Sharded(Strategy):
    """Each rank steps what it owns."""

    def __init__(self, model: Transformer, mesh: Mesh, config: Config, device: torch.device) -> None:
        """Takes the place of the parameters of `model`, which may be on the meta device, and of their `.grad`. Values
        are those of `model.initial_values`.

        Collective. Raises JobError where the settings do not go together.
        """
        self.communicator = communicator = mesh.everyone
        self._settings, self._device = config.optimizer, device
        self._stage = config.parallel.shard
        self._part = ModelPart(model, mesh)
        owners, copies = mesh["shard"], mesh["data"]
        self._norm_ranks, self._is_first_copy = mesh.group("pipeline", "shard", "tensor"), copies.rank == 0
        nbytes = bucket_bytes(config.comm, config.compression, communicator.node_count, device.type)
        bits = WEIGHT_BITS.get(config.compression.weights, 0)
        # A partition of its own, so that the same ranks of both stages own the same part
        alone = self._part.in_two_stages
        self._partitions = make_partitions(model, device, self._stage, nbytes, owners, bits > 0, alone)
        longest = max(len(each.buffer) for each in self._partitions)
        self._channels = open_channels(owners, device, config.comm, config.compression, longest)
        dense = config.compression.model_copy(update={"codec": "none", "hierarchical": False})
        self._copies: list[Channel] = []
        if copies.size > 1:
            self._copies = open_channels(copies, device, config.comm, dense, longest // owners.size)
        make_codec = codec_factory(config.compression.codec)
        self._codecs: list[Codec] = [make_codec(each, config.compression) for each in self._partitions]
        if type(self._codecs[0]).reduce_to_owners_ is Codec.reduce_to_owners_:
            raise JobError(no_half_for_owners(config.compression.codec))
        self._gradients = ShardedGradients(
            self._partitions, self._codecs, self._channels, self._copies, keeps_whole=self._stage == 1
        )
        rounded = RoundedWeights(bits, self._partitions, owners.size) if bits else None
        self._weights = ShardedParameters(readers_of(model, self._partitions), self._channels, rounded)
        # Of weights that are sent as differences, what all ranks have: as it is saved, or was read
        self._keeps_differences = bool(bits) and self._stage < 3
        self._gathered: dict[str, Tensor] = {}
        self._has_gathered = False  # whether a checkpoint that is being restored has them
        model.parameter_access = self._weights
        self._pieces: dict[str, nn.Parameter] = {}
        self._runs: dict[str, Runs] = {}
        for partition, own in zip(self._partitions, self._gradients.own, strict=True):
            for name, piece in partition.pieces.items():
                self._pieces[name] = nn.Parameter(partition.master[piece.span])
                self._pieces[name].grad = own[piece.span]
                self._runs[name] = runs_within(self._part.runs[name], piece.start, piece.stop)
        self._decaying = [piece for name, piece in self._pieces.items() if len(self._part.shapes[name]) >= 2]
        self._counted = [piece for name, piece in self._pieces.items() if self._part.counts[name]]
        self._optimizer = self._make_optimizer()
        self._agreement = StepAgreement()
        self._arrival: Work[None] = Work.done(None)
        self._count_traffic()
        self.start(model.initial_values(config.train.seed))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Over what this rank owns, which may be nothing."""
        shapes, sliced = self._part.shapes, {}
        if self._settings.algorithm == "muon":
            for partition in self._partitions:
                for name, lengths in partition.lengths().items():
                    if is_hidden_matrix(name, shapes[name]):
                        sliced[name] = SlicedMatrix(shapes[name], lengths, self._pieces.get(name))
        rest = [(name, piece) for name, piece in self._pieces.items() if name not in sliced]
        return make_optimizer_of(
            [piece for name, piece in rest if len(shapes[name]) >= 2],
            [piece for name, piece in rest if len(shapes[name]) < 2],
            self._settings,
            SlicedMatrices([*sliced.values()], self._channels, self._device) if sliced else (),
        )

    # ---- one step

    def begin_step(self, own: Report) -> Work[int]:
        totals = self._agreement.begin(self.communicator, own)
        self._gradients.begin_step()
        return totals

    def set_last_micro_batch(self) -> None:
        self._gradients.set_last_micro_batch()

    def end_pass(self) -> None:
        self._gradients.end_pass()

    @property
    def passes_are_collective(self) -> bool:
        return self._stage > 1

    @property
    def evaluation_is_collective(self) -> bool:
        return self._stage == 3

    def wait(self) -> None:
        self._gradients.wait()
        self._weights.wait()  # on a rank that has made no pass
        self._count_traffic()
        self._arrival.wait()  # of the step before: the host stays at most one step ahead of a GPU
        self._arrival = self.communicator.arrival(self._device)

    def synchronize(self) -> None:
        self.communicator.arrival(self._device).wait()

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def _count_traffic(self) -> None:
        """Nothing is under way: what follows, weights that have changed among it, is the next step's."""
        size = self.communicator.size
        dense = sum(2 * (size - 1) * each.buffer.nbytes // size for each in self._partitions)
        self._traffic = traffic_of(self.channels, dense)
        for channel in self.channels:
            channel.reset_counters()

    def norm(self) -> Tensor:
        counted = [each.grad for each in self._counted if each.grad is not None]
        norm = norm_of_parts(counted or [torch.zeros(1, device=self._device)], self._norm_ranks)
        self._gradients.keep_residuals_if(norm.isfinite())
        return norm

    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("of ranks that go on when another has died, which these do not")

    @property
    def channels(self) -> list[Channel]:
        return [*self._channels, *self._copies]

    def scale_(self, factor: float | Tensor) -> None:
        self._gradients.scale_(factor)

    def scale_residuals_(self, factor: float) -> None:
        for kept in self.residuals():
            kept.mul_(factor)

    def leave_out_if(self, found: Tensor) -> bool:
        return leave_out_if(self._optimizer, found)

    def apply(self, rate: float) -> None:
        add_penalties_(self._decaying, self._settings)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._weights.publish()

    def end_step(self) -> StepEnd:
        return self._agreement.end()

    def arrive(self) -> None:
        self._weights.wait()

    def finish(self) -> int:
        return 0

    def close(self) -> None:
        self._weights.wait()
        for channel in self.channels:
            channel.close()

    # ---- after a rank has died: the state that it had is lost

    def abandon(self) -> None:
        for channel in self.channels:
            channel.abandon()

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

    def held_parts(self) -> HeldParts:
        kinds = state_kinds(self._settings, self._part.shapes)
        saved = self._part.saved(self._is_first_copy) & self._runs.keys()
        held = HeldParts(self._part.shapes, self._runs, kinds, saved)
        return held.with_kind(_GATHERED) if self._keeps_differences else held

    def parameters(self) -> dict[str, Tensor]:
        return dict(self._pieces)

    @contextmanager
    def replaced(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        kept = [each.master.clone() for each in self._partitions]
        gathered = self._gathered_state()
        for name, piece in self._pieces.items():
            piece.data.copy_(parameters[name])
        self._weights.publish_unrounded()
        try:
            yield
        finally:
            for each, master in zip(self._partitions, kept, strict=True):
                each.master.copy_(master)
            self._publish_as(gathered)

    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        for name, values in parameters or ():
            for partition in self._partitions:
                partition.load(name, values)
        self._weights.publish_unrounded()

    def log_numbers(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        gradients = {"step": self._gradients.step, "trials": [], "ranks": self.communicator.size}
        return {"gradients": gradients, "has_gathered": self._keeps_differences}

    def load_state_dict(self, state: dict[str, Any], step: int, as_saved: bool) -> None:
        self._gradients.step = state["gradients"]["step"]
        self._has_gathered = state.get("has_gathered", False)

    def optimizer_state(self) -> dict[str, Tensor]:
        self._gathered = self._gathered_state()
        return {**named_state(self._optimizer, self._pieces), **self._gathered}

    def _gathered_state(self) -> dict[str, Tensor]:
        """Copies of this rank's part of the weights that all ranks have, where these differ from the masters."""
        if not self._keeps_differences:
            return {}
        self._weights.wait()
        return {
            f"{_GATHERED}.{name}": partition.weights[partition.part][piece.span].to(torch.float32, copy=True)
            for partition in self._partitions
            for name, piece in partition.pieces.items()
        }

    def _publish_as(self, gathered: Mapping[str, Tensor]) -> None:
        """Gathers the weights of `_gathered_state`, or, if there are none, the masters. Collective."""
        for partition in self._partitions if gathered else ():
            own = partition.weights[partition.part]
            for name, piece in partition.pieces.items():
                own[piece.span].copy_(gathered[f"{_GATHERED}.{name}"])
        self._weights.publish_unrounded(of_masters=not gathered)

    def rank_state(self) -> RankState:
        self._gradients.take_back()  # in case of a step that a rank could not read its part of
        return RankState(summed=self.step_state())

    def restored(self, residual_factor: float) -> None:
        self.scale_residuals_(residual_factor)
        self._publish_as(self._gathered if self._has_gathered else {})
