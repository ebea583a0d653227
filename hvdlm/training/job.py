"""A job's beginning and end: ranks join, and whatever goes wrong, every rank ends with a non-zero exit status."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.launch import check_alike, connect
from hvdlm.errors import HvdlmError, JobError

logger = logging.getLogger(__name__)


@contextmanager
def job(engine: str, timeout: float, config_digest: str) -> Iterator[Communicator]:
    """The communicator of this job: `connect(engine, timeout)`, once `check_alike` has found that all ranks fit.

    An error that all ranks raise together is told by rank 0, and all leave in good order. One that a rank meets
    alone is told by that rank, which then ends the job at once: the others may be waiting for it for ever.
    """
    communicator = connect(engine, timeout)
    try:
        check_alike(communicator, config_digest)
        yield communicator
        communicator.barrier()
        communicator.close()
    except JobError as error:
        if communicator.rank == 0:
            logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        communicator.barrier()  # rank 0 has spoken before any other rank's exit makes the launcher end it
        communicator.close()
        raise SystemExit(1) from None
    except HvdlmError as error:
        if communicator.size == 1:
            raise
        logger.debug("where the error arose", exc_info=True)
        place = f"rank {communicator.rank} on {communicator.hosts[communicator.rank]}"
        communicator.abort(f"hvdlm: error: {place}: {error}")
    except Exception:
        if communicator.size == 1:
            raise
        communicator.abort(f"rank {communicator.rank} met a bug in hvdlm:\n{traceback.format_exc()}")
