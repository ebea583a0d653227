"""Start and end of a job: ranks connect, and after any error every rank ends with a non-zero exit status."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from hvdlm.comm.activity import Watchdog
from hvdlm.comm.agreement import check_ranks_match
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.connect import connect
from hvdlm.comm.failure import DeadRankError, LeftOutError, LostRankError, say, try_for
from hvdlm.comm.launch import detect
from hvdlm.comm.launcher_output import print_as_launcher
from hvdlm.comm.launcher_process import end_launcher_after, refuse_ranks_that_seem_alone
from hvdlm.comm.missing_ranks import MissingRankReporter
from hvdlm.errors import HvdlmError, JobError
from hvdlm.exit_status import STOPPED_EARLY

logger = logging.getLogger(__name__)

# Seconds in which all ranks that have lost another can print that, before the first of them ends the job.
_SECONDS_TO_PRINT = 1.0

# Seconds for other ranks to be ended by one that is stuck
_SECONDS_TO_END = 5.0

# With comm.elastic a rank that is stuck ends before the others have waited `comm.timeout` for it: then they would end
_SOONER = 0.8

# Seconds within which ranks reach an error that all of them raise; after that a rank has raised it alone.
_SECONDS_TO_AGREE = 3.0

# After which a launcher that has been asked to end the job, and has not, is killed
_SECONDS_FOR_LAUNCHER = 20.0


@contextmanager
def job(
    engine: str, timeout: float, config_digest: str, is_elastic: bool = False, engine_sums: bool = True
) -> Iterator[Communicator]:
    """The communicator of this job, of `connect` with these arguments, once `check_ranks_match` has passed.

    An error that all ranks raise together (JobError) is printed by rank 0, and all ranks shut down. One that a rank
    raises alone is printed by that rank, which then aborts the job: the others may be waiting for it for ever. A
    JobError that not all ranks raise is treated so too, by the lowest rank that has raised it.

    A rank for which what its `activity` says takes longer than `timeout` seconds ends the job; if that `is_elastic`, it
    ends itself, and the others outlive it.
    """
    launch = detect(os.environ)
    refuse_ranks_that_seem_alone(launch)
    print_as_launcher(launch)
    communicator = connect(engine, timeout, is_elastic, engine_sums)
    reporter: MissingRankReporter | None = None

    def where() -> str:  # with comm.elastic the number may change
        return f"rank {communicator.rank} on {communicator.hosts[communicator.rank]}"

    def end_this_rank(doing: str) -> None:
        _end_stuck(communicator, reporter, f"hvdlm: error: {where()} is stuck: it {doing} (comm.timeout)", is_elastic)

    is_alone = communicator.size == 1 and not communicator.supports("join")
    patience = math.inf if is_alone else timeout * _SOONER if is_elastic else timeout
    watchdog = Watchdog(communicator.activity, patience, end_this_rank)

    def find_others() -> None:
        nonlocal reporter
        if reporter is not None:
            reporter.close()
        reporter = MissingRankReporter(communicator, watchdog.doing)

    try:
        check_ranks_match(communicator, config_digest)
        find_others()
        if communicator.supports("join"):
            communicator.after_regroup.append(lambda: check_ranks_match(communicator, config_digest))
        communicator.after_regroup.append(find_others)
        yield communicator
        watchdog.close()
        with suppress(DeadRankError):  # one that has died here has done all that it had to do
            communicator.barrier()
        assert reporter is not None
        reporter.close()
        communicator.close()
    except LeftOutError as error:
        say(f"hvdlm: {error}")
        os._exit(STOPPED_EARLY)
    except JobError as error:
        watchdog.close()
        _end_by_job_error(communicator, reporter, error)
    except LostRankError as error:
        missing = f"; {reporter.report()}" if reporter else ""
        say(f"hvdlm: error: {error}{missing}")
        if communicator.local_rank == 0:
            end_launcher_after(_SECONDS_FOR_LAUNCHER)
        time.sleep(_SECONDS_TO_PRINT)
        communicator.abort(f"hvdlm: {where()} ends the job")
    except HvdlmError as error:
        if communicator.size == 1:
            raise
        logger.debug("where the error arose", exc_info=True)
        _end_all(communicator, reporter, f"hvdlm: error: {where()}: {error}")
    except Exception:
        if communicator.size == 1:
            raise
        _end_all(communicator, reporter, f"rank {communicator.rank} met a bug in hvdlm:\n{traceback.format_exc()}")


def _end_by_job_error(communicator: Communicator, reporter: MissingRankReporter | None, error: JobError) -> NoReturn:
    """Ends this rank with status 1, after the error has been printed once; and the others, if they have not raised it.

    That is found out by the reporter's connections: a rank that has not raised it is in the middle of a collective
    operation, which the messages of another would spoil.
    """
    if communicator.rank == 0:
        logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
    if reporter is not None:  # without it the error comes from the comparison of all ranks, which all have made
        if communicator.rank == 0:
            if not reporter.have_all_failed(_SECONDS_TO_AGREE):
                _end_all(communicator, reporter, "")
        else:
            is_shared = reporter.has_rank_0_seen_all_fail(_SECONDS_TO_AGREE)
            if is_shared is None:
                os._exit(1)
            if not is_shared:
                where = f"rank {communicator.rank} on {communicator.hosts[communicator.rank]}"
                _end_all(communicator, reporter, f"hvdlm: error: {where}: {error}")
    communicator.barrier()  # rank 0 has printed the error before another rank's exit makes the launcher end rank 0
    if reporter is not None:
        reporter.close()
    communicator.close()
    raise SystemExit(1) from None


def _end_stuck(
    communicator: Communicator, reporter: MissingRankReporter | None, reason: str, is_elastic: bool
) -> NoReturn:
    """Ends this rank with status 1, from a thread of its own, and the others unless they can go on without it.

    None of what it does is waited for long: whatever does not answer may be what the rank is stuck in.
    """
    say(reason)
    try_for(_SECONDS_TO_PRINT, lambda: faulthandler.dump_traceback(sys.stderr, all_threads=True))
    if not is_elastic:
        if reporter is not None:
            try_for(_SECONDS_TO_END, reporter.end_others)
        try_for(_SECONDS_TO_END, lambda: communicator.abort(""))
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL)  # mpirun ends all ranks when one exits with an error
    raise AssertionError("this process has been killed")


def _end_all(communicator: Communicator, reporter: MissingRankReporter | None, reason: str) -> NoReturn:
    """Prints `reason`, unless it is empty, and ends all ranks with status 1."""
    say(reason)
    if reporter is not None:
        reporter.end_others()
    communicator.abort("")
