"""One rank: `hvdlm train` whose passes are sleeps, and which notes when it comes to each phase of its start.

Started by first_step.py under mpirun: rank.py DIRECTORY ARGUMENTS. Writes DIRECTORY/RANK.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, whose packages this imports

from hvdlm.cli import main
from hvdlm.training import run
from hvdlm.training.hardware import seconds_alive
from scaling.simulated_compute import SimulatedTrainer

_TOKENS_PER_SECOND = 1e6
_notes: dict[str, tuple[float, float]] = {}  # by phase: seconds since the process began, and of a core that it used


def note(phase: str) -> None:
    """That a phase has ended, the first time."""
    _notes.setdefault(phase, (seconds_alive(), time.process_time()))


class NotedTrainer(SimulatedTrainer):
    """Notes when it is made, and its first step."""

    def __init__(self, *arguments: Any) -> None:
        note("data set and devices")
        super().__init__(*arguments)
        self.prepare(_TOKENS_PER_SECOND)
        note("model and channels")

    def train_step(self, *arguments: Any) -> bool:
        note("run directory and weights")
        result = super().train_step(*arguments)
        if "first step" not in _notes:
            note("first step")
            (Path(sys.argv[1]) / f"{self.communicator.rank}.json").write_text(json.dumps(_notes))
        return result


@contextmanager
def noted_job(*arguments: Any) -> Iterator[Any]:
    """The job, whose ranks have found each other."""
    note("imports and settings")
    with _job(*arguments) as communicator:
        note("connections and checks")
        yield communicator


if __name__ == "__main__":
    _job, run.job = run.job, noted_job
    run.Trainer = NotedTrainer  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
