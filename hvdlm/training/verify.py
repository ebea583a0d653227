"""`hvdlm verify`: whether checkpoints are what was written, and of use."""

from __future__ import annotations

from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.training import checkpoint


def verify(paths: list[Path]) -> int:
    """Prints a line for each checkpoint that `paths` are, or hold as run directories, to stdout.

    Returns 0 if all are whole, 1 otherwise. Raises HvdlmError if some path is no checkpoint and holds none.
    """
    found = [each for path in paths for each in checkpoint.all_in(path)]
    return max([_verify(path) for path in found], default=0)


def _verify(path: Path) -> int:
    try:
        opened = checkpoint.open_checkpoint(path)
        opened.model()  # raises if a weight is not finite
        size, ranks = opened.bytes(), opened.state.get("world_size")
    except HvdlmError as error:
        print(error)
        return 1
    print(f"{path}: whole, {size / 2**20:,.1f} MiB, of {ranks} ranks")
    return 0
