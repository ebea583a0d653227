"""What follows a step on all ranks together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Due:
    """What follows the last step, and has not been done yet."""

    log: bool = False
    check: bool = False
    first_step: bool = False
    save: bool = False
    validation: bool = False
    end: str = ""  # why training ends with it, before the step that was planned

    def add(self, other: Due) -> None:
        """Adds what is due elsewhere."""
        for name, is_due in vars(other).items():
            setattr(self, name, getattr(self, name) or is_due)


def recurs(step: int, every: int, round_steps: int = 1) -> bool:
    """Whether what is done every so many steps, if that is not 0, follows this step, or another one of its round, which
    it ends: rounds are of `round_steps`, from step 1 on.
    """
    before = (step - 1) // round_steps * round_steps
    return every > 0 and step // every > before // every
