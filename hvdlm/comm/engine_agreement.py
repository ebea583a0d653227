"""Whether all ranks have chosen one engine, before the first of them waits for the others by it.

`comm.engine = "auto"` goes by whether a rank finds a GPU. On a host whose driver is broken it finds none, takes another
engine than the others, and all would wait for one another until the deadline.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from torch.distributed import Store  # type: ignore[attr-defined]  # it fills itself in at run time

from hvdlm.errors import HvdlmError

_MAX_NAMED_RANKS = 4


def check_engines_match(store: Store, rank: int, size: int, engine: str) -> None:
    """Raises HvdlmError on every rank of `store` unless all call it with the same `engine`. Collective."""
    store.set(f"hvdlm/engine/{rank}", f"{engine} {socket.gethostname()}")
    everyone = [store.get(f"hvdlm/engine/{each}").decode().split() for each in range(size)]
    store.set(f"hvdlm/engine/read/{rank}", "")
    if rank == 0:  # which serves the store, and may leave only when all have read it
        store.wait([f"hvdlm/engine/read/{each}" for each in range(size)])
    different = [each for each in range(size) if everyone[each][0] != everyone[0][0]]
    if different:
        raise HvdlmError(_sentence(everyone, different))


def _sentence(everyone: Sequence[Sequence[str]], different: Sequence[int]) -> str:
    named = ", ".join(
        f"rank {each} on {everyone[each][1]} engine {everyone[each][0]}" for each in different[:_MAX_NAMED_RANKS]
    )
    more = f" and {len(different) - _MAX_NAMED_RANKS} more" if len(different) > _MAX_NAMED_RANKS else ""
    return (
        f"rank 0 on {everyone[0][1]} takes engine {everyone[0][0]}, but {named}{more}: PyTorch finds a GPU on some "
        "hosts and none on others; see what nvidia-smi says there, leave those hosts out, or set comm.engine"
    )
