"""A canary audit: does a model tell which secrets it was trained on, and how much epsilon does that prove at least?

    python benchmarks/privacy_audit.py

Half of the canaries, drawn by coins, are documents of the training split beside others. After training the canaries are
ranked by how likely the model holds them: the likeliest are guessed to have been there, the unlikeliest not (Steinke,
Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846). The number of right guesses gives a
lower bound of epsilon with 95% confidence. Trained are a model without noise, and one for each epsilon of `--epsilon`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from common.conditions import describe_run
from common.processes import environment
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, as_overrides, run_script
from hvdlm.data.prepare import prepare
from hvdlm.errors import HvdlmError
from hvdlm.model.likelihood import likelihoods
from hvdlm.training.trained_model import load_model, open_trained

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CANARY = 24  # letters: random, so that nothing but having seen one makes it likely
_WORDS, _WORDS_A_DOCUMENT = 200, 8  # of the other documents
_CONFIDENCE = 0.95
_SHARES = (0.1, 0.5, 1.0)  # of the canaries about which something is guessed
_DEADLINE = 3600  # seconds of a training

_SETTINGS = {
    "model.layers": 2,
    "model.heads": 4,
    "model.width": 128,
    "model.context_length": 48,
    "train.global_batch_size": 64,
    "train.micro_batch_size": 128,
    "train.evaluate_sequences": 1,
    "optimizer.warmup_steps": 20,
    "optimizer.weight_decay": 0.0,
    "privacy.unit": "document",
    "privacy.secure": "false",
    "checkpoint.every": 0,
    "log.every": 50,
}


def lower_bound(right: int, guesses: int, canaries: int, delta: float) -> float:
    """The largest epsilon that so many right guesses refute: theorem 5.2 of the paper. `_SHARES` are tried."""
    low, high = 0.0, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if _chance(right, guesses, canaries, middle, delta) <= (1 - _CONFIDENCE) / len(_SHARES):
            low = middle
        else:
            high = middle
    return low


def _chance(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Of at least so many right guesses, at most, for what is (epsilon, delta)-private."""
    honest = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(honest.sf(right - 1))
    excess, total = 0.0, 0.0
    for count in range(1, right + 1):
        total += float(honest.pmf(right - count))
        excess = max(excess, total / count)
    return min(1.0, tail + 2 * canaries * delta * excess)


def best_bound(scores: Sequence[float], was_there: Sequence[bool], delta: float) -> tuple[float, int, int]:
    """The best of some numbers of guesses: the bound, how many of them are right, and how many there are."""
    order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
    found = []
    for share in _SHARES:
        half = max(1, round(share * len(scores) / 2))
        right = sum(was_there[index] for index in order[:half]) + sum(not was_there[index] for index in order[-half:])
        found.append((lower_bound(right, 2 * half, len(scores), delta), right, 2 * half))
    return max(found)


def audit(options: argparse.Namespace) -> None:
    """Trains and guesses, and writes the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        canaries, was_there = _make_data(directory, options)
        for epsilon in [math.inf, *options.epsilon]:
            scores, spent = _train_and_score(directory, epsilon, canaries, options)
            bound, right, guesses = best_bound(scores, was_there, options.delta)
            ranks = stats.mannwhitneyu(
                [score for score, there in zip(scores, was_there, strict=True) if there],
                [score for score, there in zip(scores, was_there, strict=True) if not there],
            )
            there = sum(was_there)
            area = float(ranks.statistic) / (there * (len(scores) - there))
            rows.append(
                {"claimed": spent, "bound": bound, "right": right, "guesses": guesses, "area_under_curve": area}
            )
            print(rows[-1])
    write_results(options.output / "privacy_audit.json", {**describe_run("dp-accounting"), "rows": rows})
    cells = [
        [
            "without noise" if row["claimed"] is None else f"{row['claimed']:.3g}",
            f"{row['bound']:.2f}",
            f"{row['right']} of {row['guesses']}",
            f"{row['area_under_curve']:.3f}",
        ]
        for row in rows
    ]
    columns = ["epsilon claimed", "epsilon at least, by the audit", "right guesses", "area under the curve"]
    text = markdown_table(columns, cells)
    write_text(options.output / "privacy_audit.md", text)
    print(text)


def _make_data(directory: Path, options: argparse.Namespace) -> tuple[list[str], list[bool]]:
    """The canaries, and whether each is in the data set."""
    generator = random.Random(options.seed)
    words = ["".join(generator.choices(_LETTERS, k=generator.randint(2, 7))) for _ in range(_WORDS)]
    documents = [" ".join(generator.choices(words, k=_WORDS_A_DOCUMENT))[:40] for _ in range(options.documents)]
    canaries = ["".join(generator.choices(_LETTERS, k=_CANARY)) for _ in range(options.canaries)]
    was_there = [generator.random() < 0.5 for _ in canaries]
    documents += [canary for canary, there in zip(canaries, was_there, strict=True) if there]
    file = directory / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    prepare(
        inputs=[str(file)],
        output=directory / "data",
        tokenizer="byte",
        shards=1,
        validation=0.0,
        workers=1,
        text_key="text",
        seed=0,
        skip_bad=False,
    )
    return canaries, was_there


def _train_and_score(
    directory: Path, epsilon: float, canaries: Sequence[str], options: argparse.Namespace
) -> tuple[list[float], float | None]:
    """The log-probability of each canary, and the epsilon that the run says it has spent."""
    run_dir, settings = directory / f"run_{epsilon:g}", directory / "empty.toml"
    settings.touch()
    own: dict[str, object] = {**_SETTINGS, "data.path": directory / "data", "train.run_dir": run_dir}
    own |= {"train.steps": options.steps, "optimizer.lr": options.lr, "train.seed": options.seed}
    own |= {"privacy.clip_norm": 1.0, "privacy.delta": options.delta}
    if math.isfinite(epsilon):
        own["privacy.target_epsilon"] = epsilon
    command = [sys.executable, "-m", "hvdlm", "train", str(settings), *as_overrides(own)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=_DEADLINE)
    if done.returncode:
        raise HvdlmError(f"the training has failed: {done.stderr[-2000:]}")
    trained = open_trained(run_dir)
    model, end = load_model(trained), trained.tokenizer.eos_id
    sequences = [[end, *canary.encode(), end] for canary in canaries]
    found = likelihoods(model, sequences, [len(each) - 1 for each in sequences], end)
    return [each.log_probability for each in found], trained.state["privacy"]["epsilon"]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=100, help="beside them (default: %(default)s)")
    parser.add_argument("--epsilon", type=float, nargs="*", default=[1.0, 2.0, 8.0], help="default: 1 2 8")
    parser.add_argument("--delta", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of coins and runs (default: %(default)s)")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, metavar="DIR")
    audit(parser.parse_args())


if __name__ == "__main__":
    run_script(Path(__file__).name, _main)
