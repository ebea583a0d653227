"""The interface between the training loop and the way in which ranks combine their work.

The loop computes a loss on micro-batches, and knows of other ranks only by a `Strategy`:

    tokens = strategy.begin_step(Report(tokens of this rank, stop requested, ...))
    for each micro-batch: (before the backward pass of the last one: tokens.wait(), set_last_micro_batch())
        loss.backward()
    strategy.wait()
    strategy.scale_(to the mean over tokens, and clipped by strategy.norm())
    strategy.apply(learning rate)
    strategy.end_step()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.comm.work import Work
from hvdlm.errors import JobError
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.sync import GradientSync, Traffic
from hvdlm.strategies.held_parts import HeldParts


class Pace(NamedTuple):
    """How long a rank computes, waits left out."""

    picoseconds: int  # a token; 0 if it has not measured
    error: int  # the standard error of that


class Report(NamedTuple):
    """What a rank tells the others of a step."""

    tokens: int = 0  # its targets that count
    stop: bool = False  # it is asked to stop
    save: bool = False  # it asks for a checkpoint
    unread: int = 0  # sequences that it leaves out, because they cannot be read
    error: str | None = None  # why it cannot go on
    end: bool = False  # training is to end with this step
    pace: Pace | None = None  # of steps in which all ranks tell theirs

    def message(self) -> Tensor:
        """(6,) int64, all but the pace; of several ranks they add up."""
        flags = [int(self.error is not None), int(self.end)]
        return torch.tensor([self.tokens, int(self.stop), int(self.save), self.unread, *flags])

    def joined_with(self, later: Report) -> Report:
        """What a rank tells of this step and a later one at once, but for tokens and pace."""
        save, unread = self.save or later.save, self.unread + later.unread
        return Report(0, self.stop or later.stop, save, unread, self.error or later.error, self.end or later.end)

    @staticmethod
    def unread_of(messages: Tensor) -> int:
        """The sequences that ranks have left out, by the sum of their messages."""
        return int(messages[3])


class StepEnd(NamedTuple):
    """What is known when a step has ended, the same on all ranks."""

    stop: bool  # some rank is asked to stop
    save: bool  # some rank asks for a checkpoint
    unread: int  # sequences that ranks have left out since they have met
    ranks_have_met: bool  # whether each has waited for the others in it, so that one more message costs little
    event: str | None = None  # what the user is to be told
    end: bool = False  # training ends with this step
    paces: tuple[Pace, ...] = ()  # of all ranks, if they have told them


@dataclass(frozen=True)
class RankState:
    """Tensors that each rank has of its own, by name, and how they are shared out among another number of ranks."""

    summed: dict[str, Tensor] = field(default_factory=dict)  # each gets an equal part of the sum: residuals
    averaged: dict[str, Tensor] = field(default_factory=dict)  # each gets the mean over the old ranks
    dropped: dict[str, Tensor] = field(default_factory=dict)  # stay as they are

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {**self.summed, **self.averaged, **self.dropped}


class Group(NamedTuple):
    """Ranks that step together."""

    ranks: Communicator
    number: int  # among the groups


class UnreadableBatchError(JobError):
    """Some rank cannot read its part of a batch. Raised on all ranks; `model` is that of the step before."""


class Strategy(ABC):
    """How the ranks of a communicator combine their work. Every call is made by every rank."""

    communicator: Communicator
    sync: GradientSync  # holds this rank's gradients

    # ---- one step

    def takes_part(self) -> bool:
        """Whether this rank trains on its part of the next batch. Once a step, before it begins."""
        return True

    @abstractmethod
    def begin_step(self, own: Report) -> Work[int]:
        """Clears gradients, and tells the others of this rank.

        The result: the targets over whose mean loss the gradients of `wait` are. Waiting for it raises
        UnreadableBatchError on all ranks if some rank could not read.
        """

    @abstractmethod
    def set_last_micro_batch(self) -> None:
        """From here on a gradient that is made is final."""

    def end_pass(self) -> None:  # noqa: B027
        """After the backward pass of every micro-batch."""

    @property
    def passes_are_collective(self) -> bool:
        """Whether all ranks have to make as many passes in a step."""
        return False

    @property
    def evaluation_is_collective(self) -> bool:
        """Whether all ranks have to make as many forward passes in a validation."""
        return False

    @abstractmethod
    def wait(self) -> None:
        """Returns when every `.grad` is the one that this rank is to act on, as a sum over tokens."""

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """What was sent since this step began, or since the one before did where messages go on between steps."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a scalar on their device, as this rank is to act on it."""

    @abstractmethod
    def norm_and_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """`norm`, and in the same message `numbers`, (k,) float64 on the CPU, of all N ranks together: (N, k).
        Whoever has it knows that all of them have the sums. Collective.
        """

    @property
    @abstractmethod
    def channels(self) -> list[Channel]:
        """Those over which the work of a step travels to other ranks; some ranks may have none."""

    def synchronize(self) -> None:
        """Returns when all that was queued on the device has ended; raises LostRankError after `comm.timeout`."""
        self.sync.synchronize()

    def scale_(self, factor: float | Tensor) -> None:
        """Multiplies all gradients by a number."""
        self.sync.scale_(factor)

    @abstractmethod
    def scale_residuals_(self, factor: float) -> None:
        """Multiplies by a number what has not been delivered of gradients, as the loss is scaled from now on."""

    @abstractmethod
    def leave_out_if(self, found: Tensor) -> bool:
        """Lets the next `apply` change nothing if `found`, a boolean scalar on a GPU, is true, for which the host need
        not wait. Returns False where that is not possible.
        """

    @abstractmethod
    def apply(self, rate: float) -> None:
        """The optimizer's step on the gradients, with learning rate `rate`."""

    @abstractmethod
    def end_step(self) -> StepEnd:
        """Ends a step, whether or not its gradients were applied. After a rank has died in it, the next call goes on.

        Raises UnreadableBatchError on all ranks if some rank could not read its part of this or an earlier batch.
        """

    @abstractmethod
    def arrive(self) -> None:
        """Returns when nothing that this rank has begun to send is under way."""

    @abstractmethod
    def finish(self) -> int:
        """After the last step of a run: the parameters of all ranks become those that are to be kept.

        Returns how many sequences ranks have left out since they have met.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes what was opened for messages between ranks. Collective."""

    # ---- local steps

    @property
    def is_local(self) -> bool:
        """Whether no rank, or group of ranks, waits for another in the next step."""
        return False

    @property
    def group(self) -> Group:
        """The ranks over which gradients are summed in the next step."""
        return Group(self.communicator, 0)

    # ---- after a rank has died (training/elastic.py)

    @abstractmethod
    def abandon(self) -> None:
        """Ends the threads of channels, whose operations have been revoked. Not collective."""

    @abstractmethod
    def release(self) -> None:
        """Lets go of the model, whose `.grad` another strategy may take over. After `abandon`; not collective."""

    @abstractmethod
    def step_state(self) -> dict[str, Tensor]:
        """What the messages of a step change before it is applied, by name: views."""

    @abstractmethod
    def residuals(self) -> list[Tensor]:
        """What this rank has not delivered, flat: views."""

    def progress(self) -> Any:
        """What the others need to know of this rank for all to `go_on`; None if it can do without. After `abandon`."""
        return None

    def go_on(self, progress: Sequence[Any]) -> int:
        """Goes on among the ranks that are left, of whom some told a `progress` that is not None. Collective.

        Returns the first batch of which the others have not got what the dead ranks have learned.
        """
        raise NotImplementedError

    def send_again(self) -> None:  # noqa: B027
        """Sends again what was under way when a rank died, once all ranks that are left have agreed how they go on."""

    # ---- the parameters to keep

    @property
    @abstractmethod
    def ranks_are_equal(self) -> bool:
        """Whether all ranks now hold equal parameters and moments, and have acted on equal gradients."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are validated and saved, by name; equal on all ranks, bit for bit."""

    def saved_parameters(self) -> dict[str, Tensor]:
        """Those that are saved, where no parts are held: `parameters`, unless ranks have them rounded. On rank 0."""
        return self.parameters()

    def held_parts(self) -> HeldParts | None:
        """What this rank holds of parameters and optimizer state; None: all of it."""
        return None

    @contextmanager
    def evaluation_parameters(self) -> Iterator[None]:
        """Within this context the model computes with `parameters()`."""
        yield

    def replaced(self, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within this context the model computes with others, of the names and shapes of `parameters()`. Collective."""
        raise NotImplementedError

    # ---- state

    @abstractmethod
    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Begins a run, with the model of rank 0 on all ranks; or with other parameters of this rank's model, which
        come one after the other by name, and are equal on ranks that have the same ones. Collective.
        """

    @abstractmethod
    def log_numbers(self) -> dict[str, float]:
        """Numbers for a line of metrics.jsonl, in a step in which the ranks have met. Collective."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State that is equal on all ranks and no tensor."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], step: int, as_saved: bool) -> None:
        """Restores a saved state after `step` steps. What the methods below return may depend on it.

        `as_saved`: on as many ranks, combined in the same way.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """State that is equal on all ranks, by name: views, to be saved, or to be filled when a run is resumed."""

    @abstractmethod
    def rank_state(self) -> RankState:
        """State that each rank has of its own: views, likewise."""

    @abstractmethod
    def restored(self, residual_factor: float) -> None:
        """Completes restoring a checkpoint once `parameters`, `optimizer_state` and `rank_state` have been filled.

        `residual_factor`: by what the scale of the loss differs. Collective.
        """


def raise_if_unreadable(communicator: Communicator, error: str | None) -> None:
    """Raises UnreadableBatchError on all ranks, of which some has an `error`. Collective."""
    try:
        raise_on_all_ranks(communicator, communicator.all_gather_object(error))
    except JobError as failure:
        raise UnreadableBatchError(str(failure)) from None
