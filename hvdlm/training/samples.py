"""`hvdlm evaluate --samples`: texts of the validation split, continued by a model, beside how they go on there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.model.generate_batch import Prompt, Sampling
from hvdlm.scoring.distributed_model import Completion, DistributedModel
from hvdlm.scoring.text_quality import distinct, repetition, rouge, vocabulary_coverage

_LONGEST = 128  # tokens of a prompt, and of a continuation; half a context if that is shorter


class HeldOutText(NamedTuple):
    """Tokens of a validation split, and those that follow, to the end of the document if it is near."""

    prompt: list[int]
    continuation: list[int]


def held_out_texts(data: DataSet, context_length: int, count: int, seed: int) -> list[HeldOutText]:
    """`count` windows of the validation split that do not overlap, drawn by `seed`; none if `count` is 0.

    Raises HvdlmError if there are fewer, or if they cannot be read.
    """
    if not count:
        return []
    half = min(_LONGEST, context_length // 2)
    if not half:
        raise HvdlmError("--samples: a model whose context is one token continues no text")
    windows = [
        (shard, start)
        for shard, info in enumerate(data.validation.shards)
        for start in range(0, info.n_tokens - 2 * half + 1, 2 * half)
    ]
    random.Random(seed).shuffle(windows)
    texts: list[HeldOutText] = []
    for shard, start in windows:
        if len(texts) == count:
            break
        tokens = data.validation.read(shard, start, 2 * half).tolist()
        prompt, following = tokens[:half], tokens[half:]
        if following[0] != data.eos_id:
            end = following.index(data.eos_id) if data.eos_id in following else half
            texts.append(HeldOutText(prompt, following[:end]))
    if len(texts) < count:
        raise HvdlmError(
            f"--samples {count}: the validation split of {data.path} has only {len(texts)} texts of {2 * half} tokens; "
            "ask for fewer samples"
        )
    return texts


def continue_texts(model: DistributedModel, texts: Sequence[HeldOutText], seed: int) -> list[list[int]]:
    """Continuations that the model draws from its own probabilities, as long as those of the texts or, where it ends
    the document, shorter. Collective; equal on any number of ranks."""
    eos_id = model.tokenizer.eos_id
    requests = [
        Completion(Prompt(text.prompt, len(text.continuation), Sampling(temperature=1.0), (seed + number) % 2**63))
        for number, text in enumerate(texts)
    ]
    answers = model.answer(requests)
    return [[token for token in answer if token != eos_id] for answer in answers if isinstance(answer, list)]


def print_text_quality(tokenizer: Tokenizer, texts: Sequence[HeldOutText], samples: Sequence[list[int]]) -> None:
    """A table of the samples' measures, and of those of as many tokens of how the texts go on."""
    held_out = [text.continuation[: len(sample)] for text, sample in zip(texts, samples, strict=True)]
    tokens = sum(map(len, samples))
    title = f"{len(samples):,} continuations, {tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("", "samples", "held-out text"):
        table.add_column(column, justify="right" if column else "left")
    both = samples, held_out
    for n in (1, 2, 3, 4):
        table.add_row(f"distinct-{n}", *(f"{distinct(each, n):.4f}" for each in both))
    table.add_row("repeated 4-grams", *(f"{repetition(each):.2%}" for each in both))
    table.add_row("vocabulary", *(f"{vocabulary_coverage(each, tokenizer.vocab_size):.2%}" for each in both))
    scores = rouge(
        [tokenizer.decode(each) for each in samples], [tokenizer.decode(each.continuation) for each in texts]
    )
    for kind, score in scores.items():
        table.add_row(f"ROUGE-{kind.removeprefix('rouge')}", f"{score:.4f}", "")
    Console(highlight=False).print(table)
