"""A rank that is a parameter server, from settings to exit status."""

from __future__ import annotations

from collections.abc import Callable

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.model.transformer import without_memory
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.synchronous import SynchronousServer
from hvdlm.training.precision import DTYPES


def serve(
    group: ServerGroup,
    config: Config,
    vocab_size: int,
    servers: Communicator,
    stop_requested: Callable[[], bool],
) -> int:
    """Serves until the workers end; returns the status with which they do. `servers`: the communicator of this rank."""
    model = without_memory(config.model, vocab_size)
    model.set_compute_dtype(DTYPES[config.train.precision])
    owned = OwnedParameters(model, config, group)
    status = SynchronousServer(owned, group, servers.activity, stop_requested).run()
    servers.activity.idle()
    group.mailbox.close()
    return status
