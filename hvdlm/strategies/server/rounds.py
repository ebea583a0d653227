"""The global batches between two versions of the parameters that asynchronous servers keep: a round.

That is one batch where workers push gradients, and `local_steps.every` where they push what they have learned in as
many steps of their own. Rounds are numbered by the version that they begin with. The last one may have fewer batches,
as has the first one of a job that goes on from a step within a round.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm.config import Config


@dataclass(frozen=True)
class ServedRounds:
    """Of a run of so many `batches`."""

    every: int  # batches of a round
    batches: int

    @staticmethod
    def of_run(config: Config) -> ServedRounds:
        """Those that `config` asks for."""
        return ServedRounds(config.steps_of_served_round, config.planned_steps)

    @property
    def count(self) -> int:
        """Rounds of the run, which is the version after its last batch."""
        return -(-self.batches // self.every)

    def version_after(self, batches: int) -> int:
        """The version with which training goes on after so many batches."""
        return self.count if batches >= self.batches else batches // self.every

    def end(self, version: int) -> int:
        """Batches before this version."""
        return min(version * self.every, self.batches)

    def first_after(self, batches: int) -> int:
        """The first version that follows so many batches."""
        return min(self.count, -(-batches // self.every))

    def batches_from(self, first: int) -> range:
        """The batches of a round from its batch `first` on."""
        return range(first, self.end(first // self.every + 1))
