"""Two steps of a model by ranks that may not take more memory than so much: `memory_limit.py STAGE MIB`."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "ranks")]

from sharded_body import make_config, make_trainer  # noqa: E402  # the path above comes first
from training_body import Batches  # noqa: E402

from hvdlm.comm.connect import connect  # noqa: E402
from hvdlm.config import Config  # noqa: E402


def address_space() -> int:
    """Of this process, bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def main(stage: int, mib: int) -> None:
    values = make_config("llama", stage).model_dump(by_alias=True)
    values["model"].update(layers=12, width=640, heads=10, kv_heads=10, mlp_width=1728)  # 60 million parameters
    comm = connect("mpi", 60.0)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + mib * 2**20, resource.RLIM_INFINITY))
    trainer, batches = make_trainer(comm, Config.model_validate(values)), Batches(comm, 0, ignored=False)
    for _ in range(2):
        trainer.train_step(batches, False)
    assert trainer.norm.isfinite()
    trainer.strategy.close()
    comm.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
