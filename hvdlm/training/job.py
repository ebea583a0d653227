"""Start and end of a job: ranks connect, and after any error every rank ends with a non-zero exit status."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.launch import check_ranks_match, connect
from hvdlm.comm.missing_ranks import MissingRankReporter
from hvdlm.errors import HvdlmError, JobError

logger = logging.getLogger(__name__)

# Seconds in which all ranks that have lost another can print that, before the first of them ends the job.
_SECONDS_TO_PRINT = 1.0


@contextmanager
def job(engine: str, timeout: float, config_digest: str) -> Iterator[Communicator]:
    """The communicator of this job: `connect(engine, timeout)`, once `check_ranks_match` has passed.

    An error that all ranks raise together (JobError) is printed by rank 0, and all ranks shut down. One that a rank
    raises alone is printed by that rank, which then aborts the job: the others may be waiting for it for ever.
    """
    communicator = connect(engine, timeout)
    where = f"rank {communicator.rank} on {communicator.hosts[communicator.rank]}"
    reporter = None
    try:
        check_ranks_match(communicator, config_digest)
        reporter = MissingRankReporter(communicator)
        yield communicator
        communicator.barrier()
        reporter.close()
        communicator.close()
    except JobError as error:
        if communicator.rank == 0:
            logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        communicator.barrier()  # rank 0 has printed the error before another rank's exit makes the launcher end rank 0
        communicator.close()
        raise SystemExit(1) from None
    except LostRankError as error:
        missing = f"; {reporter.report()}" if reporter else ""
        print(f"hvdlm: error: {error}{missing}", file=sys.stderr, flush=True)
        time.sleep(_SECONDS_TO_PRINT)
        communicator.abort(f"hvdlm: {where} ends the job")
    except HvdlmError as error:
        if communicator.size == 1:
            raise
        logger.debug("where the error arose", exc_info=True)
        communicator.abort(f"hvdlm: error: {where}: {error}")
    except Exception:
        if communicator.size == 1:
            raise
        communicator.abort(f"rank {communicator.rank} met a bug in hvdlm:\n{traceback.format_exc()}")
