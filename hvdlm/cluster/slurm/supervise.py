"""Supervises one start of a Slurm job: runs training, makes it save before the time limit, and requeues the job.

job.sh replaces itself by this program. To stop training, it sends SIGUSR1 to the launcher and its descendants on this
node. mpirun and srun pass the signal on to their ranks; horovodrun's ranks on this node are its descendants. It is
enough if one rank receives it, and all other processes ignore it. SIGTERM would not work: mpirun and horovodrun react
by killing their ranks.
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

from hvdlm.cluster.slurm import commands
from hvdlm.cluster.slurm.start_log import (
    MAX_INTERRUPTED_STARTS,
    MAX_STARTS_WITHOUT_PROGRESS,
    Ending,
    StartLog,
    has_ended_early,
    newest_checkpoint_step,
)
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.model.presets import PRESETS

# Seconds between requests to stop. They are repeated because the launcher may not be ready to pass on the first one.
_REQUEST_INTERVAL = 5

# Seconds before the limit at which a job is requeued although its ranks are still saving; at most a third of the lead.
# After a requeue Slurm waits KillWait (30 s by default) before it kills the ranks; after the limit it does not.
_REQUEUE_MARGIN = 10

_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD}


class Supervisor:
    """One start of a Slurm job."""

    def __init__(self, directory: Path, lead: int, job: str) -> None:
        """`directory`: of the job; `job`: its number; `lead`: seconds before the limit at which training must stop.

        Raises HvdlmError if the directory's config.toml cannot be read.
        """
        self._directory, self._lead, self._job = directory, lead, job
        train = load(directory / "config.toml", [], PRESETS).train
        self._run_dir, self._steps = Path(train.run_dir), train.steps
        self._log = StartLog(directory / "starts.jsonl")
        self._end = float("inf")  # when Slurm ends the job, in seconds since 1970
        self._stop_requested = False  # training has been told to stop
        self._terminated = False  # this process has received SIGTERM, at scancel or preemption
        self._is_late = False  # training was still running shortly before the limit
        self._requeued = False

    def run(self, command: Sequence[str]) -> int:
        """Runs the launcher `command` to its end and returns the job's exit status.

        Raises HvdlmError if it cannot start, if another job trains the same run, or after too many useless starts.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they stay pending until sigtimedwait returns them
        self._begin()
        try:
            # In a session of its own, so that the launcher is not in a process group to which Slurm sends SIGTERM.
            launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=_reset_signals)
        except OSError as error:
            raise HvdlmError(f"cannot start {command[0]}: {error.strerror}") from None
        while launcher.poll() is None:
            self._handle(signal.sigtimedwait(_SIGNALS, self._seconds_to_wait()))
            if self._terminated or self._limit_within(self._lead):
                self._stop_requested = True
                _request_stop(launcher.pid)
            if self._limit_within(self._requeue_margin) and not (self._terminated or self._is_late):
                self._is_late = True
                self._print(
                    f"training has not ended {self._lead} s after it was asked to: saving takes longer than that"
                )
                self._requeue_or_give_up("stopped", STOPPED_EARLY)
        self._terminated |= signal.SIGTERM in signal.sigpending() and not self._requeued
        return self._finish(launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode)

    @property
    def _requeue_margin(self) -> float:
        return min(_REQUEUE_MARGIN, self._lead / 3)

    def _begin(self) -> None:
        """Logs this start. Raises HvdlmError if training must not start."""
        step, starts = newest_checkpoint_step(self._run_dir), self._log.starts
        if starts and starts[-1].ending is None:
            if starts[-1].job == self._job:
                self._print("the start before this one was cut short: its node failed, or Slurm preempted the job")
            elif commands.is_running(starts[-1].job):
                raise HvdlmError(
                    f"Slurm job {starts[-1].job} is training {self._run_dir} right now: wait for it, or cancel it first"
                )
        useless = self._log.without_progress(self._job, step)
        if useless.ended + useless.interrupted >= MAX_INTERRUPTED_STARTS:
            raise HvdlmError(
                f"the last {MAX_INTERRUPTED_STARTS} starts of job {self._job} ended without a new checkpoint, "
                f"{useless.interrupted} of them cut short by node failure or preemption: not started again; "
                f"see `sacct --duplicates --jobs {self._job}`; when the cluster works again, {self._how_to_continue}"
            )
        self._log.begin(self._job, step)
        self._update_end_time()
        number = sum(start.job == self._job for start in starts)
        seconds = self._end - time.time()
        limit = f"{seconds:.0f} s to the limit" if seconds < float("inf") else "Slurm does not say when it ends"
        self._print(f"start {number} of job {self._job}, from step {step}; {limit}")

    def _update_end_time(self) -> None:
        """Asks Slurm when the job ends: the limit may have changed, and a preempted job ends earlier."""
        try:
            self._end = commands.end_time(self._job)
        except HvdlmError as error:
            self._print(f"warning: {error}")

    def _handle(self, received: signal.struct_siginfo | None) -> None:
        number = received.si_signo if received else None
        if number == signal.SIGTERM:
            self._terminated = not self._requeued  # after a requeue Slurm sends SIGTERM too
        elif number == signal.SIGUSR1:
            self._end = time.time() + self._lead  # what the signal means, if squeue does not answer
            self._update_end_time()
        elif not self._stop_requested and self._limit_within(self._lead):
            self._update_end_time()

    def _limit_within(self, seconds: float) -> bool:
        return time.time() >= self._end - seconds

    def _seconds_to_wait(self) -> float:
        waits = [self._end - self._lead - time.time(), self._end - self._requeue_margin - time.time()]
        return min(
            [seconds for seconds in waits if seconds > 0] + [_REQUEST_INTERVAL if self._stop_requested else 3600]
        )

    def _finish(self, status: int) -> int:
        """Logs and prints how this start ended, and requeues the job if it should continue. Returns the exit status."""
        step = newest_checkpoint_step(self._run_dir)
        saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint"
        # The launcher's status is not enough: mpirun ends with status 0 if the daemon of another node dies.
        if status == 0 and (step >= self._steps or has_ended_early(self._run_dir, step)):
            self._log.end("done")
            self._print(f"done: {saved}")
            return 0
        if self._requeued:
            self._print(f"training has ended; {saved}; the job is back in the queue")
            return STOPPED_EARLY
        if self._terminated:
            self._log.end("told")
            self._print(
                f"stopped by SIGTERM (scancel or preemption): {saved}; if Slurm does not go on, {self._how_to_continue}"
            )
            return STOPPED_EARLY
        # The status alone is not enough: horovodrun over Gloo turns every status into 1.
        stopped = self._stop_requested or status == STOPPED_EARLY
        status = status or 1
        if not stopped and step <= self._log.starts[-1].step:
            self._log.end("failed")
            self._print(
                f"error: training failed with status {status} before it had saved anything new, for the reason above; "
                f"{saved}; when that is repaired, {self._how_to_continue}"
            )
            return status
        return self._requeue_or_give_up("stopped" if stopped else "failed", status)

    def _requeue_or_give_up(self, ending: Ending, status: int) -> int:
        """Requeues the job, unless it makes no progress; returns the exit status."""
        self._log.end(ending)
        before, step = self._log.starts[-1].step, newest_checkpoint_step(self._run_dir)
        if self._log.without_progress(self._job, step).ended >= MAX_STARTS_WITHOUT_PROGRESS:
            self._print(
                f"error: {MAX_STARTS_WITHOUT_PROGRESS} starts in a row have not got beyond step {step}, so this job "
                "ends: its time limit is too short to start, train and save once, or checkpoint.every is too long for "
                f"how often training fails; change that and write the job again, or {self._how_to_continue}"
            )
            return status
        how = "stopped before the limit" if self._stop_requested else f"{ending} with status {status}"
        self._print(f"{how}, from step {before} to {step}: back into the queue, to go on from there")
        try:
            commands.requeue(self._job)
        except HvdlmError as error:
            self._print(f"error: {error}; {self._how_to_continue}")
            return status
        self._requeued = True
        return STOPPED_EARLY

    @property
    def _how_to_continue(self) -> str:
        return f"go on with `sbatch {shlex.quote(str(self._directory / 'job.sh'))}`"

    def _print(self, sentence: str) -> None:
        print(f"hvdlm: {sentence}", flush=True)


def _reset_signals() -> None:
    """Runs in the child before it executes the launcher, which must ignore SIGUSR1 but pass it on to the ranks."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _request_stop(launcher: int) -> None:
    """Sends SIGUSR1 to the launcher's process and all its descendants on this node."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(launcher)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGUSR1)


def main() -> int:
    """Parses the arguments that job.sh passes, and runs the launcher."""
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
