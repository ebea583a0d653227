"""What the model of a rank is of the whole one, where several ranks share it."""

from __future__ import annotations

import math

from hvdlm.comm.mesh import Mesh
from hvdlm.model.transformer import Transformer, without_memory
from hvdlm.parallel.pipeline.stage_model import StageModel
from hvdlm.parallel.tensor.layout import flat_runs, is_divided
from hvdlm.parallel.tensor.model import TensorParallelTransformer
from hvdlm.strategies.held_parts import Runs, with_positions


class ModelPart:
    """The parameters of this rank's model by name, as runs of those of the whole."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        whole = without_memory(model.config, model.vocab_size)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
        self.runs: dict[str, Runs] = {name: [(0, math.prod(self.shapes[name]))] for name, _ in model.named_parameters()}
        # Whether norms count a parameter here, and checkpoints have it from here: of those that several ranks have as a
        # whole, only one
        self.counts = dict.fromkeys(self.runs, True)
        # Parameters whose gradients two stages of a pipeline add up
        self.in_two_stages: list[str] = []
        if isinstance(model, StageModel):
            self.in_two_stages = model.in_two_stages()
            self.counts.update(dict.fromkeys(model.not_counted(), False))
        if isinstance(model, TensorParallelTransformer):
            for name in self.runs:
                self.runs[name] = flat_runs(model.regions[name], self.shapes[name])
                self.counts[name] &= is_divided(name) or mesh.is_first("tensor")

    def saved(self, is_first_copy: bool) -> frozenset[str]:
        """Parameters that this rank saves; `is_first_copy`: whether it is the first of those with the same part."""
        return frozenset(name for name, counts in self.counts.items() if counts and is_first_copy)


def runs_within(runs: Runs, start: int, stop: int) -> Runs:
    """Of numbers that are runs of a whole, one behind the other: those from `start` to `stop`, as runs of the whole."""
    found = []
    for begin, end, position in with_positions(runs):
        first, last = max(start - position, 0), min(stop - position, end - begin)
        if first < last:
            found.append((begin + first, begin + last))
    return found
