"""What methods reach: `hvdlm train` by method, learning rate, length and seed, skipped where finished."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.methods import parse_method
from common.setups import Cluster
from convergence.runs import Variant, is_finished, read_run, run_config, train
from hvdlm.config import Config
from hvdlm.errors import HvdlmError

DENSE = "none"


@dataclass(frozen=True)
class Trained:
    """One run."""

    method: str
    rate: float  # peak learning rate
    length: float  # steps over those of the study
    seed: int
    curve: list[tuple[int, float]]  # tokens, and the validation loss after them

    @property
    def loss(self) -> float:
        """The last validation loss, nats per token."""
        return self.curve[-1][1]


def train_all(
    cluster: Cluster, config: Config, wanted: Iterable[tuple[str, float, float, int]], runs: Path
) -> list[Trained]:
    """Trains what is not finished of `wanted`: method, rate, length, seed. Raises HvdlmError if a run fails."""
    return [_train(cluster, config, *each, runs) for each in wanted]


def _train(cluster: Cluster, config: Config, method: str, rate: float, length: float, seed: int, runs: Path) -> Trained:
    steps = round(config.train.steps * length)
    train_section = config.train.model_copy(update={"steps": steps})
    optimizer = config.optimizer.model_copy(update={"lr": rate})
    variant = Variant(parse_method(method), error_feedback=True)
    parent = runs / f"rate-{rate:g}-steps-{steps}"
    own = run_config(config.model_copy(update={"train": train_section, "optimizer": optimizer}), variant, seed, parent)
    if not is_finished(own):
        print(f"== {method}, learning rate {rate:g}, {steps} steps, seed {seed}", flush=True)
        if status := train(cluster, own):
            raise HvdlmError(f"{own.train.run_dir} ended with status {status}: see the messages above")
    points = read_run(own, variant).points
    return Trained(method, rate, length, seed, [(point.tokens, point.loss) for point in points])


def best_rate(swept: Sequence[Trained], method: str) -> float:
    """The learning rate with which a method ends at the lowest loss, the mean over seeds."""
    losses: dict[float, list[float]] = {}
    for each in swept:
        if each.method == method:
            losses.setdefault(each.rate, []).append(each.loss)
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))


def excess_percent(trained: Sequence[Trained], method: str) -> list[float]:
    """By how many percent a method's last loss exceeds that of codec none after as many tokens, by seed."""
    dense, own = _of_length_1(trained, DENSE), _of_length_1(trained, method)
    return [100 * (own[seed].loss / dense[seed].loss - 1) for seed in sorted(own.keys() & dense.keys())]


def length_needed(trained: Sequence[Trained], method: str) -> float | None:
    """How long a method must train, over the steps of the study, to end at the loss at which codec none ends.

    The mean over seeds, each interpolated between runs of several lengths, where loss is taken to be linear in the
    logarithm of the length. At least the shortest length that was run; None if some seed's longest does not reach it.
    """
    targets = {seed: each.loss for seed, each in _of_length_1(trained, DENSE).items()}
    needed = []
    for seed, target in targets.items():
        losses = {each.length: each.loss for each in trained if (each.method, each.seed) == (method, seed)}
        length = crossing(losses, target)
        if length is None:
            return None
        needed.append(length)
    return statistics.fmean(needed) if needed else None


def crossing(losses: Mapping[float, float], target: float) -> float | None:
    """The least length at which the loss, given at some lengths, is `target`."""
    lengths = sorted(losses)
    if not lengths:
        return None
    if losses[lengths[0]] <= target:
        return lengths[0]
    for short, long in itertools.pairwise(lengths):
        if losses[long] <= target:
            share = (losses[short] - target) / (losses[short] - losses[long])
            return math.exp(math.log(short) + share * (math.log(long) - math.log(short)))
    return None


def mean_curve(trained: Sequence[Trained], method: str) -> list[tuple[int, float]]:
    """Tokens and validation loss, mean over seeds, of the runs of length 1."""
    curves = [each.curve for each in _of_length_1(trained, method).values()]
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def _of_length_1(trained: Sequence[Trained], method: str) -> dict[int, Trained]:
    return {each.seed: each for each in trained if each.method == method and each.length == 1}
