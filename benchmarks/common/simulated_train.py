"""`hvdlm train` whose passes are sleeps: `simulated_train.py SPEED,SPEED,... ARGUMENTS`, tokens/s of each worker.

So that more workers than cores have speeds of their own. Servers, messages and the optimizer are real.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

from hvdlm.cli import main
from hvdlm.training import run
from scaling.simulated_compute import SimulatedPasses

SPEEDS = [float(each) for each in sys.argv[1].split(",")]


class OwnSpeed(SimulatedPasses):
    """With the speed of this rank."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prepare(SPEEDS[self.communicator.rank])


if __name__ == "__main__":
    run.Trainer = OwnSpeed  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
