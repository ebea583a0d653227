"""`hvdlm train` whose ranks die by SIGKILL, or suffer otherwise: `dying.py PLACE:STEP:RANK,... ARGUMENTS...`.

RANK is that of the launcher. A place is a function below; the process is killed there in the step after STEP steps, in
the first start of a job that Slurm or torchrun starts anew.
HVDLM_FAULT_TIMES names a file that gets the time of each fault, HVDLM_REST says how long a rank rests in each step,
HVDLM_SEQUENCES names a directory that gets a file a rank with what it trains on, and other files.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import hvdlm
from hvdlm.cli import main
from hvdlm.comm.failure import DeadRankError
from hvdlm.gradients.bucket_codecs import flat_states
from hvdlm.gradients.channel import Channel
from hvdlm.scoring.distributed_model import DistributedModel
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.local_steps.fragment import DifferenceBucket, Fragment
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.strategies.muon.optimizer import MuonAdamW
from hvdlm.training import checkpoint, task_evaluation, trainer
from hvdlm.training.elastic import Elastic
from hvdlm.training.saver import Saver
from hvdlm.training.step_log import StepLog
from hvdlm.training.task_evaluation import TaskScores
from hvdlm.training.trainer import Trainer
from hvdlm.training.validation import Validation

UNDER_HOROVODRUN = "HOROVOD_RANK" in os.environ
_RANKS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "RANK")  # of horovodrun, mpirun, srun, torchrun
OWN_RANK = next(int(os.environ[name]) for name in _RANKS if name in os.environ)
_STARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
IS_FIRST_START = all(os.environ.get(name, "0") == "0" for name in _STARTS)


class Here:
    """The trainer of this process, once it has begun a step; and how often a place was passed in this step."""

    trainer: Trainer
    step = -1
    passed = 0


NOW = time.time  # as it is before a fault below


def note_fault() -> None:
    if path := os.environ.get("HVDLM_FAULT_TIMES"):
        with Path(path).open("a", encoding="utf-8") as file:
            print(NOW(), file=file, flush=True)


def die() -> None:
    note_fault()
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, step: int, passes: int = 0, act: Callable[[], None] = die) -> None:
    """Acts instead of calling `owner.name` in a step, after so many calls in it."""
    original = getattr(owner, name)

    def acting(*arguments: Any, **options: Any) -> Any:
        if Here.step == step:
            if Here.passed == passes:
                act()
            Here.passed += 1
        return original(*arguments, **options)

    setattr(owner, name, acting)


def note_steps() -> None:
    """Knows in which step this process is, from when it asks for the batch."""
    original = Trainer._next_batch

    def noting(self: Trainer, *arguments: Any) -> Any:
        Here.trainer, Here.step, Here.passed = self, self.step, 0
        time.sleep(float(os.environ.get("HVDLM_REST", "0")))
        note_sequences(self)
        return original(self, *arguments)

    Trainer._next_batch = noting  # type: ignore[method-assign]


def note_sequences(trainer: Trainer) -> None:
    if path := os.environ.get("HVDLM_SEQUENCES"):
        with (Path(path) / f"rank_{OWN_RANK}").open("a", encoding="utf-8") as file:
            print(json.dumps([trainer.step, trainer.parts.own(trainer.step, OWN_RANK)]), file=file, flush=True)


def data(step: int) -> None:
    before(Trainer, "_micro_batches", step)


def forward(step: int) -> None:
    before(Trainer, "micro_batch_loss", step)


def after_its_save(step: int) -> None:
    """In the forward pass, when a checkpoint that this rank writes is whole."""

    def end() -> None:
        while not Here.trainer.saver._has_told:
            Here.trainer.saver.tell()
            time.sleep(0.01)
        die()

    before(Trainer, "micro_batch_loss", step, act=end)


RESTS: dict[int, float] = {}  # seconds for each sequence, by the step from which on


def slow(step: int) -> None:
    """This rank does not die: from this step on it takes 10 ms more for each sequence."""
    rest_from(step, 0.01)


def slower(step: int) -> None:
    rest_from(step, 0.03)


def rest_from(step: int, seconds: float) -> None:
    if not RESTS:
        original = Trainer.micro_batch_loss

        def resting(self: Trainer, inputs: torch.Tensor, *rest: Any) -> Any:
            time.sleep(len(inputs) * RESTS.get(max((each for each in RESTS if each <= Here.step), default=-1), 0.0))
            return original(self, inputs, *rest)

        Trainer.micro_batch_loss = resting  # type: ignore[method-assign]
    RESTS[step] = seconds


def backward(step: int) -> None:
    def from_now_on() -> None:
        weight = Here.trainer.model.final_norm.weight
        weight.register_hook(lambda _: die())

    before(Trainer, "micro_batch_loss", step, act=from_now_on)


def bucket(step: int) -> None:
    """In the third message of a step's sums: in the middle of a ring all-reduce."""
    owner: type
    if UNDER_HOROVODRUN:
        from hvdlm.comm.tcp import TcpCommunicator as owner
    else:
        from hvdlm.comm.mpi import MPICommunicator as owner

    before(owner, "_send", step, passes=2)


def codec(step: int) -> None:
    """Before the third bucket is encoded. So all ranks have summed the first one."""
    before(Channel, "reduce_", step, passes=2)


def sums(step: int) -> None:
    before(Elastic, "norm", step)


def norm(step: int) -> None:
    before(EveryStep, "norm_and_numbers", step)


def update(step: int) -> None:
    """All ranks may have the norm, and may not."""
    before(Trainer, "_update", step)


def orthogonalising(step: int) -> None:
    """The others have the norm, and wait for this rank's share of Muon's updates."""
    before(MuonAdamW, "_orthogonalise", step, passes=1)


def kept_from_the_norm(step: int) -> None:
    """This rank does not die: it has given its part of the norm, and is told that another rank has died."""
    original = EveryStep.norm_and_numbers

    def norm_that_fails(self: EveryStep, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = original(self, numbers)
        if Here.step == step and not Here.passed:
            Here.passed = 1
            time.sleep(1)  # in which the others complete the step, and one of them dies
            Here.trainer.communicator.revoke()
            raise DeadRankError("for the test")
        return found

    EveryStep.norm_and_numbers = norm_that_fails  # type: ignore[method-assign]


def kept_from_the_barrier(step: int) -> None:
    """This rank does not die: it has the sums of the round after this step, and is told that another has died."""
    original = Fragment.end

    def end_that_fails(self: Fragment, has_overlapped: bool) -> torch.Tensor:
        self.arrive()
        if Here.step == step and not Here.passed:
            Here.passed = 1
            for barrier in self._barriers:
                barrier.wait()
            time.sleep(1)  # in which the others end the round, and train on
            Here.trainer.communicator.revoke()
            raise DeadRankError("for the test")
        return original(self, has_overlapped)

    Fragment.end = end_that_fails  # type: ignore[method-assign]


def begin_local_steps(step: int) -> None:
    """The others may have begun them."""
    before(LocalSteps, "_leave_warm_up", step)


def begin_round(step: int) -> None:
    before(Fragment, "begin", step)


def end_round(step: int) -> None:
    before(Fragment, "end", step)


def merge(step: int) -> None:
    """All ranks have the sums of the round, and some may have ended it."""
    before(DifferenceBucket, "end_round_", step)


def last_round(step: int) -> None:
    before(LocalSteps, "finish", step)


def log(step: int) -> None:
    before(StepLog, "write", step)


def tasks(step: int) -> None:
    """Between a validation and the tasks that follow it."""
    before(TaskScores, "score", step)


def answering(step: int) -> None:
    """In the middle of the tasks, while the others compute their part of a second list of requests."""
    before(DistributedModel, "answer", step, passes=1)


def unwritten_scores(step: int) -> None:
    """Rank 0, between the message that the tasks are done and the line of metrics."""
    before(task_evaluation, "scores_of", step)


def written_scores(step: int) -> None:
    """Rank 0, when the scores are written."""
    before(Saver, "tell_validated", step)


def validation(step: int) -> None:
    before(Validation, "run", step)


def saving(step: int) -> None:
    """Rank 0, while it writes the checkpoint of this step, however far it has trained meanwhile."""
    original, passed = checkpoint.make_durable, 0

    def acting(path: Path) -> None:
        nonlocal passed
        passed += f"step_{step + 1:08d}" in str(path)
        if passed > 3:
            die()
        original(path)

    checkpoint.make_durable = acting


def recovery(step: int) -> None:
    """While the ranks agree how to go on after another death in this step."""
    before(Elastic, "_agree", step)


def rebuilding(step: int) -> None:
    before(Elastic, "_replace_strategy", step)


def regrouping(step: int) -> None:
    """Before it asks horovodrun for its place, after another death in this step."""
    from hvdlm.comm.elastic_rendezvous import ElasticRendezvous

    before(ElasticRendezvous, "regroup", step)


def meeting(step: int) -> None:
    """When it has its place, and the others wait for it."""
    from hvdlm.comm.elastic_rendezvous import ElasticRendezvous

    before(ElasticRendezvous, "meet", step)


def preparing(step: int) -> None:
    """While it gets ready to join others; `step` is -1, as it has not begun one."""
    before(trainer, "make_model", step)


# ---- faults of which nobody dies


def unfit(step: int) -> None:
    """This rank has another version of hvdlm."""
    hvdlm.__version__ = "another"


def stuck(step: int) -> None:
    def sleep_for_ever() -> None:
        note_fault()
        time.sleep(10_000)

    before(Trainer, "micro_batch_loss", step, act=sleep_for_ever)


def infinite(step: int) -> None:
    """A gradient of this rank is infinite, in this step alone."""

    def spoil() -> None:
        note_fault()
        own = Here.step
        weight = Here.trainer.model.final_norm.weight
        weight.register_hook(lambda gradient: gradient * float("inf") if Here.step == own else gradient)

    before(Trainer, "micro_batch_loss", step, act=spoil)


def flip(step: int) -> None:
    """A bit of this rank's moments, by which its parameters go their own way."""

    def spoil() -> None:
        note_fault()
        Here.trainer.strategy.optimizer_state()["exp_avg.final_norm.weight"].view(torch.int32)[0] ^= 1 << 22

    before(Trainer, "_update", step, act=spoil)


def clock_forward(step: int) -> None:
    before(Trainer, "micro_batch_loss", step, act=lambda: set_clock(86_400))


def clock_backward(step: int) -> None:
    before(Trainer, "micro_batch_loss", step, act=lambda: set_clock(-86_400))


def set_clock(seconds: float) -> None:
    note_fault()
    time.time = lambda: NOW() + seconds


def quota(step: int) -> None:
    """This rank cannot write its part of the checkpoint of this step."""
    save_file = safetensors.torch.save_file

    def failing(tensors: Any, file: Any, *rest: Any) -> None:
        if f"rank_{OWN_RANK:05d}" in str(file) and Here.trainer.saver.step == step + 1:
            note_fault()
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        save_file(tensors, file, *rest)

    safetensors.torch.save_file = failing


def residuals(step: int) -> None:
    """This rank does not die: it says whether codecs have what they had before the step, or before others have joined,
    once it goes on."""
    begin, regroup, agree, replace = Elastic.begin_step, Elastic.regroup, Elastic._agree, Elastic._replace_strategy
    own: dict[str, torch.Tensor] = {}
    had_changed: list[bool] = []

    def note(self: Elastic) -> None:
        own.update({name: each.clone() for name, each in self._trainer.strategy.step_state().items()})

    def are_as_before(self: Elastic) -> bool:
        now = self._trainer.strategy.step_state()
        return now.keys() == own.keys() and all(now[name].equal(own[name]) for name in own)

    def noting(self: Elastic) -> None:
        begin(self)
        if Here.step == step and not own:
            note(self)

    def regrouping(self: Elastic, loader: Any) -> Any:
        note(self)
        return regroup(self, loader)

    def agreeing(self: Elastic) -> Any:
        had_changed.append(not are_as_before(self))
        return agree(self)

    def replacing(self: Elastic, progress: Any) -> None:
        is_new = self._trainer.communicator.is_new
        replace(self, progress)
        if not is_new:
            print(f"rank {OWN_RANK}: had changed {had_changed}, as before: {are_as_before(self)}", flush=True)

    Elastic.begin_step, Elastic.regroup = noting, regrouping  # type: ignore[method-assign]
    Elastic._agree, Elastic._replace_strategy = agreeing, replacing  # type: ignore[method-assign]


def saves_residuals(step: int) -> None:
    """This rank keeps in files what it has not delivered before a step, and when the others go on with that step."""
    begin, replace = Elastic.begin_step, Elastic._replace_strategy

    def save(when: str) -> None:
        path = Path(os.environ["HVDLM_SEQUENCES"]) / f"{when}_{OWN_RANK}.pt"
        torch.save({name: each.clone() for name, each in Here.trainer.strategy.rank_state().summed.items()}, path)

    def beginning(self: Elastic) -> None:
        begin(self)
        if Here.step == step and Here.trainer.communicator.size == int(os.environ["OMPI_COMM_WORLD_SIZE"]):
            save("before")

    def replacing(self: Elastic, progress: Any) -> None:
        replace(self, progress)
        save("after")

    Elastic.begin_step, Elastic._replace_strategy = beginning, replacing  # type: ignore[method-assign]


def reopening(step: int) -> None:
    """While the rounds that were under way begin anew."""
    before(Fragment, "begin_again", step)


def round_residuals(step: int) -> None:
    """This rank does not die: it says whether codecs have what they had before the round, when that begins anew."""
    begin, again, send = Fragment.begin, Fragment.begin_again, Fragment._send
    own: dict[str, list[torch.Tensor]] = {}

    def are_as_before(fragment: Fragment) -> bool:
        return all(map(torch.equal, flat_states(fragment.codecs), own[fragment.name]))

    def beginning(self: Fragment, *arguments: Any) -> None:
        own[self.name] = [each.clone() for each in flat_states(self.codecs)]
        begin(self, *arguments)

    def beginning_again(self: Fragment, *arguments: Any) -> None:
        had_changed = not are_as_before(self)

        def sending(fragment: Fragment, *arguments: Any) -> None:
            print(f"rank {OWN_RANK}: had changed {had_changed}, as before: {are_as_before(fragment)}", flush=True)
            send(fragment, *arguments)

        Fragment._send = sending  # type: ignore[method-assign]
        again(self, *arguments)
        Fragment._send = send  # type: ignore[method-assign]

    Fragment.begin, Fragment.begin_again = beginning, beginning_again  # type: ignore[method-assign]


if __name__ == "__main__":
    plan, *arguments = sys.argv[1:]
    own = [each.split(":") for each in plan.split(",") if each and int(each.split(":")[2]) == OWN_RANK]
    for place, step, _ in own if IS_FIRST_START else []:
        globals()[place](int(step))
    note_steps()
    sys.exit(main(arguments))
