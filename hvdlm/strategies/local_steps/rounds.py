"""Which fragment of the model begins its round, or ends it, after which step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

# A round should take no more than this share of the time in which it hides: neither is the same every time
_SHARE = 0.9


@dataclass(frozen=True)
class Rounds:
    """Each fragment has a round every `every` steps, and they are spread over these evenly, the last one at their end
    (Douillard et al., "Streaming DiLoCo", arXiv:2501.18512, section 2.3).
    """

    every: int
    fragments: int
    overlap: int  # steps from the beginning of a round to its end
    warmup_steps: int  # of the run, before the first local one

    def ending(self, step: int) -> list[int]:
        """The fragments whose round ends after `step` steps of the run."""
        local = step - self.warmup_steps
        if local <= self.overlap:
            return []
        offsets = [self.every * (index + 1) // self.fragments for index in range(self.fragments)]
        return [index for index, offset in enumerate(offsets) if (local - offset) % self.every == 0]

    def beginning(self, step: int) -> list[int]:
        """The fragments whose round begins after `step` steps of the run."""
        return self.ending(step + self.overlap)


def fewest_steps(compute: float, round_: float, fragments: int) -> tuple[int, int]:
    """The interval and the overlap with which a round of all fragments hides behind steps; both in seconds."""
    every = max(1, math.ceil(round_ / (_SHARE * compute)))
    return every, math.ceil(every / fragments)


def split_into_fragments(parameters: dict[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    """`count` groups of consecutive trainable parameters of about as many numbers; some are empty if `count` is large.

    A parameter is never cut, and belongs to the fragment in which its middle lies.
    """
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in trainable.values())
    fragments: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    before = 0
    for name, parameter in trainable.items():
        middle = before + parameter.numel() / 2
        fragments[int(count * middle / total)][name] = parameter
        before += parameter.numel()
    return fragments
