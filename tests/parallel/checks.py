"""What a body does that tests run on each rank: joins the job, and runs one check after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hvdlm.comm.launch import connect


def run_checks(engine: str, names: Mapping[str, Any]) -> None:
    """Runs every function of `names`, a module's, that is called check_..., in their order."""
    torch.set_num_threads(1)
    comm = connect(engine, timeout=120)  # compiling blocks may take one rank longer than another
    for name, check in list(names.items()):
        if name.startswith("check_"):
            check(comm)
            comm.barrier()
    comm.close()
    print(f"rank {comm.rank} finished", flush=True)
