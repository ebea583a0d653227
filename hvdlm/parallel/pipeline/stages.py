"""The stages of a model: which blocks, embeddings and norms each has, by what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvdlm.config import ModelSection
from hvdlm.model.size import flops_per_token

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of a model, and what stands at its ends."""

    layers: range
    is_first: bool  # it has the embeddings
    is_last: bool  # it has the final norm, the output matrix and the loss

    def holds(self, name: str, tied: bool) -> bool:
        """Whether the parameter of this name is one of the stage's; `tied`: the output matrix is the embedding."""
        module, _, rest = name.partition(".")
        if module == "blocks":
            return int(rest.partition(".")[0]) in self.layers
        if module == "token_embedding":
            return self.is_first or (self.is_last and tied)
        return self.is_first if module == "position_embedding" else self.is_last


@dataclass(frozen=True)
class Costs:
    """Of the parts of a model, in FLOPs or in seconds."""

    embedding: float
    block: float
    loss: float  # with the final norm and the product with the output matrix


def flops(config: ModelSection, vocab_size: int) -> Costs:
    """Floating-point operations for one token, forward and backward; a look-up in the embedding has none."""
    loss = 6.0 * vocab_size * config.width
    return Costs(0.0, (flops_per_token(config, vocab_size) - loss) / config.layers, loss)


def divide(counts: Sequence[int]) -> list[Stage]:
    """Stages of as many blocks as `counts` says, in their order."""
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [
        Stage(range(end - count, end), is_first=index == 0, is_last=index == len(counts) - 1)
        for index, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def blocks_by_cost(layers: int, stages: int, costs: Costs, slowness: Sequence[float] = ()) -> list[int]:
    """How many blocks each stage has, so that the costliest stage costs least, and then all cost as much as possible
    the same.

    `slowness`: of each stage's rank, by which its costs are multiplied; empty: all are equally fast.
    A stage at an end may have none, where embedding or loss alone cost more than others with all blocks.
    """

    def cost(stage: int, count: int) -> float:
        ends = costs.embedding * (stage == 0) + costs.loss * (stage == stages - 1)
        return (count * costs.block + ends) * (slowness[stage] if slowness else 1.0)

    limit, _ = _least(layers, stages, cost, max)
    _, counts = _least(
        layers,
        stages,
        lambda stage, count: cost(stage, count) ** 2 if cost(stage, count) <= limit * (1 + _ROUNDING) else math.inf,
        lambda total, more: total + more,
    )
    return counts


def _least(
    layers: int, stages: int, cost: Callable[[int, int], float], combine: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least that the costs of all stages, combined one after the other, can be, and the blocks of each stage then.

    `cost`: of the stage of a number with so many blocks.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # of the stages so far, by the blocks that they have
    for stage in range(stages):
        best = {
            done: min(
                (combine(before, cost(stage, done - others)), [*counts, done - others])
                for others, (before, counts) in best.items()
                if others <= done
            )
            for done in range(layers + 1)
        }
    return best[layers]
