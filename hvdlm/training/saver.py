"""Writes checkpoints while training goes on.

A save copies what the next step changes at once, and the rest, parameters and moments, while that step computes: no
update begins before (`have_copied`). A thread then writes the copy. At most one save is under way: the next one waits
for it. One that fails leaves the checkpoint before it as it was, and is told; `checkpoint.max_failures` of them in a
row end the job, and the last chance is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvdlm.comm.rank_errors import on_rank_0, wait_for_tasks
from hvdlm.errors import HvdlmError, JobError, write_failure
from hvdlm.strategies.held_parts import HeldParts
from hvdlm.training import checkpoint, rank_files
from hvdlm.training.checkpoint_contents import TENSOR_FILES, not_finite
from hvdlm.training.retention import Retention
from hvdlm.training.saved_state import held_parts_of, own_state, state_of
from hvdlm.training.state_copies import StateCopies

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


class UselessWeightsError(HvdlmError):
    """The weights to be saved are NaN or infinite: no later save will be of more use."""


class Saver:
    """Saves what a trainer has learned, and restores nothing."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.step = 0  # the last one whose save has begun, or that a run goes on from
        self._settings = trainer.config.checkpoint
        self._seconds = self._settings.seconds_between
        self._begun = time.monotonic()  # the last save
        self._has_asked = False  # for the next one
        self._failures = 0  # in a row
        self._is_under_way = False  # whether a save has begun whose end not all ranks know
        self._task: Future[Path] | None = None  # of this rank, in that save
        self._has_told = False  # the user, how that ended
        self._is_given_up = threading.Event()
        self._own_copies, self._copies = StateCopies(trainer.device), StateCopies(trainer.device)

    # ---- when

    def is_due_by_time(self) -> bool:
        """Whether this rank, rank 0, is to ask for a checkpoint; once for each."""
        if self._trainer.communicator.rank or not self._seconds or self._has_asked:
            return False
        self._has_asked = time.monotonic() - self._begun >= self._seconds
        return self._has_asked

    def is_due_by_step(self) -> bool:
        """Whether a checkpoint of the step that was done last is wanted, by its number."""
        steps = self._settings.steps_between
        return steps > 0 and self._trainer.step % steps == 0

    # ---- saving

    def save(self, in_background: bool) -> None:
        """Saves the state after the trainer's last step. Collective.

        In the background it returns while the state is being copied: call `have_copied` before it changes. Otherwise it
        returns when the checkpoint is written, and raises JobError on all ranks if that fails.
        """
        self.wait()
        trainer = self._trainer
        self.step, self._begun, self._has_asked = trainer.step, time.monotonic(), False
        is_last_chance = self._failures + 1 >= self._settings.max_failures
        copies = in_background and not is_last_chance
        self._is_under_way, self._has_told, self._task = True, False, None
        self._is_given_up = threading.Event()
        try:
            self._begin(copies)
        except (JobError, UselessWeightsError) as error:  # of files that other ranks have a part in
            self._task = Future()
            self._task.set_exception(error)
        if not copies:
            self.wait(must_succeed=not in_background)

    def save_what_is_done(self) -> str:
        """Saves the last step, unless it is saved; returns what an error message says of it. Collective."""
        if self.step == self._trainer.step:
            self.wait(must_succeed=True)
            return ""
        self.save(in_background=False)
        return f"; step {self.step} was saved: go on with --resume latest"

    def have_copied(self) -> None:
        """Returns when parameters and moments may change: a save that is under way has copied them."""
        self._copies.wait()

    def wait(self, must_succeed: bool = False) -> None:
        """Returns when no save is under way. Collective.

        Raises JobError on all ranks if the one that was has failed and it must not, or if too many in a row have.
        """
        if not self._is_under_way:
            return
        communicator = self._trainer.communicator
        wait_for_tasks(communicator, self._task)
        failure, is_fatal = communicator.broadcast_object(self._failure())
        self.tell()
        self._is_under_way = False
        self._failures = self._failures + 1 if failure else 0
        if failure and (must_succeed or is_fatal or self._failures >= self._settings.max_failures):
            raise JobError(failure if is_fatal else f"{failure}, or choose another train.run_dir; {_GO_ON}")

    def tell(self) -> None:
        """Tells the user of a save that has ended. On rank 0; does nothing elsewhere, or twice."""
        metrics, task = self._trainer.metrics, self._task
        if metrics is None or task is None or self._has_told or not task.done():
            return
        self._has_told = True
        error = task.exception()
        if error is None:
            metrics.write("event", self.step, message=f"saved {task.result()}")
        elif isinstance(error, HvdlmError):
            left = self._settings.max_failures - self._failures - 1
            message = f"step {self.step} was not saved: {error}; {left} more may fail (checkpoint.max_failures)"
            metrics.write("event", self.step, message=message)

    def tell_validated(self) -> None:
        """Lets `best` lead to the step that was validated, if it is the best and saved. On rank 0."""
        path = checkpoint.path_of(checkpoint.directory(self._trainer.config.train.run_dir), self.step)
        if self._settings.keep_best and self._trainer.metrics is not None and path.exists():
            checkpoint.retain(path, self._retention())

    def recover(self) -> bool:
        """After a rank has died: whether the last save did not come to its end, and is due again. Collective.

        Rank 0 may be another one now.
        """
        trainer = self._trainer
        self._is_given_up.set()  # by a rank 0 that waits for a file of the dead one
        wait_for_tasks(trainer.communicator, self._task)
        self._has_asked, self._is_under_way = False, False
        if trainer.metrics is None:  # rank 0, which has written it, has told of it
            self._task, self._has_told = None, True
        saves = trainer.communicator.all_gather_object((self.step, self._failures))
        self.step, self._failures = max(step for step, _ in saves), saves[0][1]
        run_dir = Path(trainer.config.train.run_dir)
        if self.step and not on_rank_0(trainer.communicator, lambda: checkpoint.is_saved(run_dir, self.step)):
            self.step, self._has_told = 0, True
            return True
        return False

    # ---- parts of a save

    def _begin(self, copies: bool) -> None:
        """Begins to copy what is to be written, if asked for, and to write it. Collective."""
        trainer = self._trainer
        rank, parent = trainer.communicator.rank, checkpoint.directory(trainer.config.train.run_dir)
        own, held = own_state(trainer).tensors(), held_parts_of(trainer)
        needs_directory = bool(own) or held is not None
        directory, is_shared = (
            rank_files.make_directory(trainer.communicator, parent) if needs_directory else (None, False)
        )
        if held is not None and directory is not None:
            self._begin_together(held, directory, is_shared, own, copies)
            return
        if directory is not None and not is_shared:
            rank_files.gather(trainer.communicator, directory, own)
        shared = own if is_shared else {}
        shared = self._own_copies.copy(shared) if copies else shared
        if rank == 0:
            equal = self._begin_to_copy() if copies else self._as_it_is()
            save, size = self._save_function(), trainer.communicator.size
            self._start(lambda: self._write(save, equal(), directory, shared, size))
        elif directory is not None and is_shared:
            self._start(lambda: rank_files.write_own(directory, rank, shared))

    def _begin_together(
        self, held: HeldParts, directory: Path, is_shared: bool, own: Mapping[str, Tensor], copies: bool
    ) -> None:
        """The same where each rank has a part of parameters and optimizer state: all write the files of both."""
        trainer = self._trainer
        communicator, rank = trainer.communicator, trainer.communicator.rank
        model, optimizer = trainer.parameters, trainer.optimizer_state()
        if name := next((each for each in communicator.all_gather_object(not_finite(model)) if each), None):
            raise UselessWeightsError(_useless(name, self.step))
        shapes = (held.shapes, held.state_shapes())
        on_rank_0(
            communicator, lambda: rank_files.create_together(directory, dict(zip(TENSOR_FILES, shapes, strict=True)))
        )

        def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, rank_files.Parts]:
            return {
                file: {name: (held.runs_of(name), tensors[name]) for name in names if held.saves(name)}
                for file, names in zip(TENSOR_FILES, (model, optimizer), strict=True)
            }

        if not is_shared:
            rank_files.gather(communicator, directory, own, parts_of({**model, **optimizer}))
            own, complete = {}, None
        elif copies:
            own = self._own_copies.copy(own)
            complete = self._copies.begin({name: each.detach() for name, each in {**model, **optimizer}.items()})
        else:
            self._settle()
            complete = lambda: {**model, **optimizer}  # noqa: E731
        save, size = self._save_function(), communicator.size

        def write_and_wait() -> Path | None:
            if complete is not None:
                rank_files.write_own(directory, rank, own, parts_of(complete()))
            return None if rank else self._write_with_ranks(save, None, None, directory, size)

        self._start(write_and_wait)

    def _save_function(self) -> Callable[..., Path]:
        """`checkpoint.save` but for tensors and files of ranks."""
        trainer = self._trainer
        parent = checkpoint.directory(trainer.config.train.run_dir)
        state, keep = state_of(trainer), self._retention()
        return partial(checkpoint.save, parent, self.step, state=state, tokenizer=trainer.tokenizer, keep=keep)

    def _write(
        self,
        save: Callable[..., Path],
        equal: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        directory: Path | None,
        own: Mapping[str, Tensor],
        size: int,
    ) -> Path:
        """The part of rank 0, which waits for those of the others. `save`: `checkpoint.save` but for tensors; `equal`:
        parameters and optimizer state.
        """
        model, optimizer = equal
        if name := not_finite(model):
            raise UselessWeightsError(_useless(name, self.step))
        if directory is None:
            return save(model, optimizer)
        if own:
            rank_files.write_own(directory, 0, own)
        return self._write_with_ranks(save, model, optimizer, directory, size)

    def _write_with_ranks(
        self,
        save: Callable[..., Path],
        model: Mapping[str, Tensor] | None,
        optimizer: Mapping[str, Tensor] | None,
        directory: Path,
        size: int,
    ) -> Path:
        """Completes a checkpoint once the files of all ranks are there. On rank 0; `model` and `optimizer` as of
        `checkpoint.save`.
        """
        timeout = self._trainer.config.comm.timeout
        entries = rank_files.wait_for_all(directory, size, timeout, self._is_given_up)
        return save(model, optimizer, ranks=directory, rank_entries=entries)

    def _settle(self) -> None:
        """Returns when what was queued on a GPU has been done."""
        if self._trainer.device.type == "cuda":
            torch.cuda.current_stream(self._trainer.device).synchronize()

    def _as_it_is(self) -> Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """Parameters and optimizer state, which stay as they are until the save has ended."""
        state = self._trainer.strategy.saved_parameters(), self._trainer.optimizer_state()
        self._settle()
        return lambda: state

    def _begin_to_copy(self) -> Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """Begins to copy parameters and optimizer state; returns what completes that on another thread."""
        strategy, model = self._trainer.strategy, self._trainer.strategy.saved_parameters()
        optimizer = self._trainer.optimizer_state()
        early = {name: optimizer[name] for name in optimizer.keys() & strategy.step_state().keys()}
        copied = self._copies.copy(early)  # messages of the next step change it, before the update
        late = {name: tensor.detach() for name, tensor in {**model, **optimizer}.items() if name not in early}
        complete = self._copies.begin(late)

        def equal() -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
            copies = {**complete(), **copied}
            return {name: copies[name] for name in model}, {name: copies[name] for name in optimizer}

        return equal

    def _start(self, write: Callable[[], Any]) -> None:
        """Runs `write` on a thread. The interpreter waits for that thread before it ends."""
        task: Future[Any] = Future()

        def run() -> None:
            try:
                task.set_result(write())
            except OSError as error:  # of a directory that has gone, say
                task.set_exception(HvdlmError(f"cannot write {error.filename}: {write_failure(error)}"))
            except BaseException as error:
                task.set_exception(error)

        self._task = task
        threading.Thread(target=run, name="hvdlm-saver").start()

    def _retention(self) -> Retention:
        settings, metrics = self._settings, self._trainer.metrics
        losses = dict(metrics.losses) if settings.keep_best and metrics is not None else {}
        return Retention(settings.keep, settings.keep_every, losses)

    def _failure(self) -> tuple[str | None, bool]:
        """Why the save has failed, and whether no later one can succeed."""
        error = self._task.exception() if self._task is not None else None
        if error is not None and not isinstance(error, HvdlmError):
            raise error
        return (None if error is None else str(error)), isinstance(error, UselessWeightsError)


def _useless(name: str, step: int) -> str:
    return (
        f"{name} holds NaN or infinite numbers after step {step}, which is not saved: lower optimizer.lr, and resume "
        "from the last checkpoint"
    )


_GO_ON = "then resume from the checkpoint before it"
