"""A job's beginning and end: ranks join, and whatever goes wrong, every rank ends with a non-zero exit status."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.launch import check_alike, connect
from hvdlm.comm.roll_call import RollCall
from hvdlm.errors import HvdlmError, JobError

logger = logging.getLogger(__name__)

# Seconds in which all ranks that have lost another can say so, before the first of them ends them all.
_ALL_SPEAK = 1.0


@contextmanager
def job(engine: str, timeout: float, config_digest: str) -> Iterator[Communicator]:
    """The communicator of this job: `connect(engine, timeout)`, once `check_alike` has found that all ranks fit.

    An error that all ranks raise together is told by rank 0, and all leave in good order. One that a rank meets
    alone is told by that rank, which then ends the job at once: the others may be waiting for it for ever.
    """
    communicator = connect(engine, timeout)
    place = f"rank {communicator.rank} on {communicator.hosts[communicator.rank]}"
    roll_call = None
    try:
        check_alike(communicator, config_digest)
        roll_call = RollCall(communicator)
        yield communicator
        communicator.barrier()
        roll_call.close()
        communicator.close()
    except JobError as error:
        if communicator.rank == 0:
            logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        communicator.barrier()  # rank 0 has spoken before any other rank's exit makes the launcher end it
        communicator.close()
        raise SystemExit(1) from None
    except LostRankError as error:
        missing = f"; {roll_call.missing()}" if roll_call else ""
        print(f"hvdlm: error: {error}{missing}", file=sys.stderr, flush=True)
        time.sleep(_ALL_SPEAK)
        communicator.abort(f"hvdlm: {place} ends the job")
    except HvdlmError as error:
        if communicator.size == 1:
            raise
        logger.debug("where the error arose", exc_info=True)
        communicator.abort(f"hvdlm: error: {place}: {error}")
    except Exception:
        if communicator.size == 1:
            raise
        communicator.abort(f"rank {communicator.rank} met a bug in hvdlm:\n{traceback.format_exc()}")
