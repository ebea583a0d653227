"""A race: contestants take turns, a few steps each, in an order that rotates from round to round.

All are there at once, so what else the machine does meets all alike, and a round compares neighbours in time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.setups import Place
from comparison.answers import apart
from comparison.job import Crashed, Job
from comparison.lineup import LIMIT, REFERENCE, Crew, in_order
from comparison.turns import Request, Turn
from hvdlm.config import Config

MOST_STARTS = 10  # of a job that crashes


@dataclass
class Outcome:
    """How a contestant did; a round in which it could not run is None."""

    name: str
    turns: list[Turn | None] = field(default_factory=list)
    starts: int = 0  # of its job
    crashes: list[str] = field(default_factory=list)  # of its job: why, each time
    apart: float | None = None  # from the reference after the warm-up, over the way gone; None: not comparable


def race(place: Place, crews: Sequence[Crew], config: Config, rounds: int, steps: int, scratch: Path) -> list[Outcome]:
    """Starts one job a crew and lets all contestants run, `steps` steps in each of `rounds` rounds.

    `scratch`: an empty directory that ranks see too. Raises AssertionError if replicas of a model differ.
    """
    settings = scratch / "config.toml"
    settings.write_text(config.to_toml(), encoding="utf-8")
    entries = [_Entry(place, crew, settings, steps, scratch / str(number)) for number, crew in enumerate(crews)]
    by_name = {name: entry for entry in entries for name in entry.crew.names}
    names = in_order(list(by_name))
    outcomes = {name: Outcome(name) for name in names}
    try:
        for entry in entries:
            print(f"{place.setup.name}: starting {', '.join(entry.crew.names)}", file=sys.stderr)
            entry.start()
        for number in range(rounds):
            print(f"{place.setup.name}: round {number + 1} of {rounds}", file=sys.stderr)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                outcomes[name].turns.append(by_name[name].turn(name))
    finally:
        for entry in entries:
            entry.close()
    reference = by_name[REFERENCE].parameters(REFERENCE)
    for name, outcome in outcomes.items():
        entry, own = by_name[name], by_name[name].parameters(name)
        outcome.starts, outcome.crashes = entry.starts, entry.crashes
        if name != LIMIT and own.exists() and reference.exists():
            outcome.apart = apart(own, reference, config)
    return list(outcomes.values())


class _Entry:
    """A crew's job, started again when it has crashed, `MOST_STARTS` times in all."""

    def __init__(self, place: Place, crew: Crew, settings: Path, steps: int, scratch: Path) -> None:
        self.crew = crew
        self.starts = 0
        self.crashes: list[str] = []
        self._place, self._settings, self._steps, self._scratch = place, settings, steps, scratch
        self._job: Job | None = None
        scratch.mkdir()

    def parameters(self, name: str) -> Path:
        """Where a contestant's parameters lie once it has warmed up."""
        return self._scratch / f"{self.crew.names.index(name)}.pt"

    def start(self) -> None:
        """Starts the job, and warms every contestant up by one turn."""
        while self._job is None and self.starts < MOST_STARTS:
            self.starts += 1
            try:
                self._job = Job(self._place, self.crew, self._settings, self._scratch)
                for name in self.crew.names:
                    self._job.turn(Request(name, self._steps, self.parameters(name)))
            except Crashed as crash:
                self._bury(crash)

    def turn(self, name: str) -> Turn | None:
        """None if the job crashes in it, or has crashed for good."""
        self.start()
        if self._job is None:
            return None
        try:
            return self._job.turn(Request(name, self._steps))
        except Crashed as crash:
            self._bury(crash)
            return None

    def close(self) -> None:
        if self._job is not None:
            self._job.close()

    def _bury(self, crash: Crashed) -> None:
        print(f"{', '.join(self.crew.names)}: crash {len(self.crashes) + 1}: {crash}", file=sys.stderr)
        self.crashes.append(str(crash))
        self._job = None
