"""What job.sh becomes: starts training, has it save before the time limit, and puts the job back into the queue.

Training is asked to stop by SIGUSR1 to the launcher and its descendants on this node: mpirun and srun pass it on to
their ranks, horovodrun's ranks on this node are descendants, and one rank that hears of it suffices. Everything but
ranks ignores it. SIGTERM would not do: mpirun and horovodrun answer that by killing their ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from hvdlm.cluster.slurm import controller
from hvdlm.cluster.slurm.progress import MOST_CUT_SHORT, MOST_IN_VAIN, Ending, Record, newest_step
from hvdlm.config import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS

# The exit status of a training that has saved and stopped early, as in hvdlm/training/preemption.py.
STOPPED_EARLY = 75

# Seconds between requests to stop: the first may come before the launcher is ready to pass it on.
_ASK_EVERY = 5

# Seconds before the limit at which a job leaves although its ranks are still saving; a third of the lead if that is
# less. Slurm gives them its KillWait on top, 30 s unless configured otherwise, which it would not do after the limit.
_LAST_MOMENT = 10

_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD}


class Supervisor:
    """One start of a Slurm job."""

    def __init__(self, directory: Path, lead: int, job: str) -> None:
        """`directory`: of the job. `lead`: seconds before the limit at which training is asked to stop.

        Raises HvdlmError if the directory's config.toml cannot be read.
        """
        self._directory, self._lead, self._job = directory, lead, job
        train = load(directory / "config.toml", [], PRESETS).train
        self._run_dir, self._steps = Path(train.run_dir), train.steps
        self._record = Record(directory / "starts.jsonl")
        self._end = float("inf")  # when the limit strikes, in seconds since 1970
        self._asked = False  # training was asked to stop
        self._told = False  # by SIGTERM: scancel, or preemption
        self._late = False  # training was still running at the last moment
        self._requeued = False

    def run(self, command: Sequence[str]) -> int:
        """Runs the launcher `command` to its end and returns the job's exit status.

        Raises HvdlmError if it cannot be started, or must not be.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they wait until sigtimedwait fetches them
        self._begin()
        try:
            # A session of its own: where Slurm signals process groups, the launcher is spared a SIGTERM that is for us.
            launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=_ignore_requests)
        except OSError as error:
            raise HvdlmError(f"cannot start {command[0]}: {error.strerror}") from None
        while launcher.poll() is None:
            self._hear(signal.sigtimedwait(_SIGNALS, self._seconds_to_wait()))
            if self._told or self._limit_within(self._lead):
                self._asked = True
                _ask_to_stop(launcher.pid)
            if self._limit_within(self._last_moment) and not (self._told or self._late):
                self._late = True
                self._say(f"training has not ended {self._lead} s after it was asked to: saving takes longer than that")
                self._go_on_or_give_up("stopped", STOPPED_EARLY)
        self._told |= signal.SIGTERM in signal.sigpending() and not self._requeued
        return self._conclude(launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode)

    @property
    def _last_moment(self) -> float:
        return min(_LAST_MOMENT, self._lead / 3)

    def _begin(self) -> None:
        step, starts = newest_step(self._run_dir), self._record.starts
        if starts and starts[-1].ending is None:
            if starts[-1].job == self._job:
                self._say("the start before this one was cut short: its node failed, or Slurm preempted the job")
            elif controller.is_running(starts[-1].job):
                raise HvdlmError(
                    f"Slurm job {starts[-1].job} is training {self._run_dir} right now: let it, or cancel it first"
                )
        in_vain = self._record.in_vain(self._job, step)
        if in_vain.by_themselves + in_vain.cut_short >= MOST_CUT_SHORT:
            raise HvdlmError(
                f"the last {MOST_CUT_SHORT} starts of job {self._job} ended without a new checkpoint, "
                f"{in_vain.cut_short} of them cut short by node failure or preemption: not started again; "
                f"`sacct --duplicates --jobs {self._job}` tells more; when the cluster is well, {self._how_to_go_on}"
            )
        self._record.begin(self._job, step)
        self._look_at_the_clock()
        number = sum(start.job == self._job for start in starts)
        seconds = self._end - time.time()
        limit = f"{seconds:.0f} s to the limit" if seconds < float("inf") else "Slurm does not say when it ends"
        self._say(f"start {number} of job {self._job}, from step {step}; {limit}")

    def _look_at_the_clock(self) -> None:
        """Asks Slurm for the end: the limit may have been changed, and a preempted job has an earlier one."""
        try:
            self._end = controller.end_time(self._job)
        except HvdlmError as error:
            self._say(f"warning: {error}")

    def _hear(self, received: signal.struct_siginfo | None) -> None:
        number = received.si_signo if received else None
        if number == signal.SIGTERM:
            self._told = not self._requeued  # Slurm sends it after requeueing too
        elif number == signal.SIGUSR1:
            self._end = time.time() + self._lead  # what the signal says, unless Slurm knows better
            self._look_at_the_clock()
        elif not self._asked and self._limit_within(self._lead):
            self._look_at_the_clock()

    def _limit_within(self, seconds: float) -> bool:
        return time.time() >= self._end - seconds

    def _seconds_to_wait(self) -> float:
        moments = [self._end - self._lead - time.time(), self._end - self._last_moment - time.time()]
        return min([seconds for seconds in moments if seconds > 0] + [_ASK_EVERY if self._asked else 3600])

    def _conclude(self, status: int) -> int:
        step = newest_step(self._run_dir)
        saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint"
        # A launcher's word is not enough: mpirun ends with status 0 if the daemon of another node dies.
        if status == 0 and step >= self._steps:
            self._record.end("done")
            self._say(f"done: {saved}")
            return 0
        if self._requeued:
            self._say(f"training has ended; {saved}; the job is back in the queue")
            return STOPPED_EARLY
        if self._told:
            self._record.end("told")
            self._say(
                f"stopped by SIGTERM (scancel or preemption): {saved}; if Slurm does not go on, {self._how_to_go_on}"
            )
            return STOPPED_EARLY
        stopped = self._asked or status == STOPPED_EARLY  # horovodrun over Gloo turns every status into 1
        status = status or 1
        if not stopped and step <= self._record.starts[-1].step:
            self._record.end("failed")
            self._say(
                f"error: training failed with status {status} before it had saved anything new, for the reason above; "
                f"{saved}; when that is mended, {self._how_to_go_on}"
            )
            return status
        return self._go_on_or_give_up("stopped" if stopped else "failed", status)

    def _go_on_or_give_up(self, ending: Ending, status: int) -> int:
        """Puts the job back into the queue, unless it gets nowhere; returns the exit status."""
        self._record.end(ending)
        before, step = self._record.starts[-1].step, newest_step(self._run_dir)
        if self._record.in_vain(self._job, step).by_themselves >= MOST_IN_VAIN:
            self._say(
                f"error: {MOST_IN_VAIN} starts in a row have not got beyond step {step}, so this job ends: its time "
                "limit is too short to start, train and save once, or checkpoint.every is too long for how often "
                f"training fails; change that and write the job anew, or {self._how_to_go_on}"
            )
            return status
        how = "stopped before the limit" if ending == "stopped" else f"failed with status {status}"
        self._say(f"{how}, from step {before} to {step}: back into the queue, to go on from there")
        try:
            controller.requeue(self._job)
        except HvdlmError as error:
            self._say(f"error: {error}; {self._how_to_go_on}")
            return status
        self._requeued = True
        return STOPPED_EARLY

    @property
    def _how_to_go_on(self) -> str:
        return f"go on with `sbatch {shlex.quote(str(self._directory / 'job.sh'))}`"

    def _say(self, sentence: str) -> None:
        print(f"hvdlm: {sentence}", flush=True)


def _ignore_requests() -> None:
    """In the launcher, before it becomes itself: SIGUSR1 is for ranks, and passes everything else by."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _ask_to_stop(launcher: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(launcher)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGUSR1)


def main() -> int:
    """Reads the words that job.sh gives, and runs them."""
    parser = argparse.ArgumentParser(prog="supervise", allow_abbrev=False)
    parser.add_argument("--job-directory", type=Path, required=True)
    parser.add_argument("--lead", type=int, required=True)
    parser.add_argument("launcher", nargs="+")
    options = parser.parse_args()
    try:
        supervisor = Supervisor(options.job_directory, options.lead, os.environ["SLURM_JOB_ID"])
        return supervisor.run(options.launcher)
    except HvdlmError as error:
        print(f"hvdlm: error: {error}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
