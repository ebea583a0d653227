"""Training with differential privacy, `[privacy]`: clipped gradients, noise, Poisson sampling, and what it spends.

DP-SGD (Abadi et al., CCS 2016) with any optimizer: an update is computed from the noised sum alone, divided by the
number of sequences that a batch is expected to have.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.rank_errors import on_all_ranks, on_rank_0
from hvdlm.comm.work import Work
from hvdlm.data.poisson import PoissonBatches, units_of
from hvdlm.errors import HvdlmError
from hvdlm.privacy.accountant import Accountant, Phase, check_delta
from hvdlm.privacy.model import RecordedTransformer
from hvdlm.privacy.noise import Noise, Sharers
from hvdlm.training.micro_batches import MicroBatch
from hvdlm.training.model import seed_dropout
from hvdlm.training.passes import Passes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvdlm.training.trainer import Trainer


class _Draw(NamedTuple):
    """What rank 0 decides for all."""

    noise_multiplier: float
    key: str  # by which batches are drawn


class PrivateTraining:
    """What a trainer with `privacy.clip_norm` has besides."""

    def __init__(self, trainer: Trainer) -> None:
        """Collective. Raises HvdlmError on all ranks if the data set is too small for the settings."""
        self._trainer, self._settings = trainer, trainer.config.privacy
        train, settings = trainer.config.train, self._settings
        self.units = units_of(trainer.data.train, trainer.config.model.context_length, settings.unit)
        self._accountant: Accountant | None = None  # where there is noise
        if settings.has_noise:  # on all ranks, since any may become rank 0
            make = partial(Accountant, settings.accountant, settings.delta)
            self._accountant = on_all_ranks(trainer.communicator, make)
        draw = on_rank_0(trainer.communicator, self._draw)
        # Codecs deliver of each rank's part what is no function of the sum; so do groups that step on their own. Each
        # part then has the whole noise, and depends on no unit that another rank has
        self._codes_parts = trainer.config.compression.codec != "none"
        fixed_parts = self._codes_parts or bool(trainer.config.local_steps.every)
        self.batches = PoissonBatches(draw.key, settings.unit, self.units, train.global_batch_size, fixed_parts)
        self.noise_multiplier = draw.noise_multiplier
        self._before: list[Phase] = []  # of the run, with other settings
        self._first_step = 0  # with these

    def _draw(self) -> _Draw:
        """On rank 0."""
        trainer, settings = self._trainer, self._settings
        train, what = trainer.config.train, f"{self.units:,} {settings.unit}s"
        if trainer.data.sources:
            raise HvdlmError(
                "sources with weights give their sequences unlike chances to be in a batch, which privacy.clip_norm "
                "does not account for: prepare the data set without weights"
            )
        if train.global_batch_size > self.units:
            raise HvdlmError(
                f"train.global_batch_size = {train.global_batch_size} is more than the {what} of the training split, "
                "of which privacy.clip_norm draws each at most once: lower it"
            )
        if settings.has_noise:
            check_delta("privacy.delta", settings.delta, self.units, settings.unit)
        key = os.urandom(32).hex() if settings.secure else f"{trainer.data.fingerprint} {train.seed}"
        multiplier = settings.noise_multiplier
        if self._accountant and not multiplier:
            rate, steps = train.global_batch_size / self.units, trainer.config.planned_steps
            multiplier = self._accountant.noise_multiplier(settings.target_epsilon, rate, steps)
        return _Draw(multiplier, key)

    @property
    def seed(self) -> int:
        """Of all that is drawn by sequence beside the batches: as secret as `batches.key`."""
        batches = self._trainer.parts.batch_sizes
        assert isinstance(batches, PoissonBatches)
        return int.from_bytes(hashlib.blake2b(batches.key.encode(), digest_size=8).digest(), "big") % 2**63

    @property
    def clip_norm(self) -> float:
        """Of a sequence's gradient as the passes make it: of its mean loss, over the sequences expected in a batch."""
        return self._settings.clip_norm / self._trainer.config.train.global_batch_size

    def noise(self) -> Noise:
        """Of a sum of gradients, as the passes make them, over those who are `sharers`."""
        seed = None if self._settings.secure else self._trainer.config.train.seed
        return Noise(self.noise_multiplier * self.clip_norm, seed)

    def sharers(self) -> Sharers:
        """Who shares a draw of noise in the step under way."""
        trainer = self._trainer
        if trainer.strategy.is_local:  # codecs deliver differences of parameters, which are made from noised sums
            group = trainer.strategy.group
            return Sharers(group.ranks.rank, group.ranks.size, f" of group {group.number}")
        communicator = trainer.communicator
        if self._codes_parts:
            return Sharers(0, 1, f" of rank {communicator.rank}")
        return Sharers(communicator.rank, communicator.size)

    @property
    def told_tokens(self) -> int:
        """What each rank tells of the tokens of its part of a batch, in place of their number: the others are not to
        know that, which has no noise."""
        return self._trainer.nominal_tokens // self._trainer.communicator.size

    # ---- what is spent

    def epsilon(self, step: int) -> float | None:
        """After so many steps of the run; None without noise."""
        return None if self._accountant is None else self._accountant.epsilon([*self._before, self._phase(step)])

    def last_step(self, planned: int) -> int:
        """The last step within the budget, at most `planned`. Collective."""
        budget = self._settings.target_epsilon
        if not budget:
            return planned
        return on_rank_0(self._trainer.communicator, lambda: self._last_within(budget, planned))

    def _last_within(self, budget: float, planned: int) -> int:
        assert self._accountant is not None
        return self._first_step + self._accountant.steps_within(budget, self._before, self._phase(planned))

    def _phase(self, step: int) -> Phase:
        """From the first step with these settings to `step`."""
        return Phase(max(0, step - self._first_step), self.noise_multiplier, self.batches.rate)

    @property
    def history(self) -> list[Phase]:
        """Of the steps done."""
        return [*self._before, self._phase(self._trainer.step)]

    def go_on(self, history: Sequence[Sequence[Any]]) -> None:
        """Goes on after steps that are done, as another start of the run, or another rank, has had them."""
        phases = [Phase(int(steps), *numbers) for steps, *numbers in history]
        self._first_step = sum(phase.steps for phase in phases)
        own = self._phase(self._first_step)
        if phases and phases[-1]._replace(steps=0) == own:  # none but the last has these settings
            self._first_step -= phases.pop().steps
        self._before = phases

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says."""
        settings = self._settings
        return {
            "epsilon": self.epsilon(self._trainer.step),
            "delta": settings.delta,
            "unit": settings.unit,
            "accountant": settings.accountant,
            "history": [list(phase) for phase in self.history],
        }

    def sentences(self) -> list[str]:
        """What the user is to be told when training begins."""
        settings = self._settings
        said = [
            f"gradients are clipped by {settings.unit}, of which there are {self.units:,}; each is in a batch with "
            f"probability {self.batches.rate:.3g}; noise multiplier {self.noise_multiplier:.4g}"
        ]
        if not settings.has_noise:
            return [*said, "without noise nothing is kept secret: set privacy.target_epsilon or noise_multiplier"]
        config, ranks = self._trainer.config, self._trainer.communicator.size
        if config.local_steps.every and ranks > 1:
            said.append(
                "with local_steps.every the sum of each rank's, or node's, part of a batch has the whole noise, for a "
                "batch that is as many times smaller"
            )
        elif self._codes_parts and ranks > 1:
            said.append(
                "with compression.codec the part of each rank has the whole noise, so that their sum has "
                f"{ranks**0.5:.2f} times as much"
            )
        if not settings.secure:
            said.append("privacy.secure = false: whoever knows train.seed can take the noise away again")
        return [
            *said,
            "epsilon is of the weights, and not of loss, mean_loss and what is said of losses in metrics.jsonl and "
            "elsewhere, which are without noise: keep those to yourself",
        ]


class PrivatePasses(Passes):
    """Passes whose gradients are clipped by sequence; the last one adds this rank's part of the noise."""

    def __init__(self, trainer: Trainer, privacy: PrivateTraining) -> None:
        super().__init__(trainer)
        assert isinstance(trainer.model, RecordedTransformer)
        self._model, self._privacy, self._noise = trainer.model, privacy, privacy.noise()
        self._number: dict[Tensor, int] = {
            parameter: number for number, parameter in enumerate(trainer.model.parameters())
        }

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, status: Work[int]) -> tuple[list[Tensor], int]:
        """The tokens are those that a batch, or a group's part of it, is expected to have, whatever it has."""
        losses, told = super().train(micro_batches, factor, status)
        return losses, told if self._trainer.strategy.is_local else self._trainer.nominal_tokens

    def _seed_dropout(self) -> None:
        # Which sequence gets which mask depends on the others of the batch: nobody is to know the masks
        seed_dropout(self._privacy.seed, self._trainer.step, self._trainer.readers.rank)

    def _backward(self, loss: Tensor, factor: float, is_last: bool) -> None:
        recorded = self._model.record(loss, factor)
        norms = recorded.squared_norms().sqrt_()
        finite = norms.isfinite()
        factors = torch.where(finite, (self._privacy.clip_norm / norms).clamp_(max=1.0), 0.0)  # (b,); x / 0 is inf
        if not bool(finite.all()):  # it would be told from the sum, and leave out the step
            recorded.leave_out(~finite)
        for parameter, gradient in recorded.gradients(factors):
            self._add(parameter, gradient, is_last)

    def _without_sequences(self) -> None:
        for parameter in reversed(self._number):
            self._add(parameter, torch.zeros_like(parameter), with_noise=True)

    def _add(self, parameter: Tensor, gradient: Tensor, with_noise: bool) -> None:
        """To `.grad`, as autograd does: what it calls when it has, is called."""
        if with_noise and self._noise.deviation:
            number, step = self._number[parameter], self._trainer.step
            self._noise.add_part_(gradient.view(-1), step, number, self._privacy.sharers())
        torch.autograd.backward(parameter, gradient)
