"""Continuing several prompts at once, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvdlm.model.generate import check_finite, next_token_probabilities
from hvdlm.model.transformer import KeyValueCache, Transformer, document_ids


class Sampling(NamedTuple):
    """How tokens are drawn: see `next_token_probabilities`. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class Prompt(NamedTuple):
    """What is to be continued."""

    tokens: Sequence[int]  # at least one
    limit: int  # of tokens to add; with the prompt's, at most one more than `context_length`
    sampling: Sampling
    seed: int  # of the generator on the CPU that draws this prompt's tokens


@torch.no_grad()
def generate_batch(
    model: Transformer,
    prompts: Sequence[Prompt],
    eos_id: int,
    vocab_size: int,
    is_complete: Callable[[int, Sequence[int]], bool] = lambda row, added: False,
) -> list[list[int]]:
    """What is added to each prompt: up to `limit` tokens, fewer if `eos_id` is drawn, which is then the last, or if
    `is_complete`, given the prompt's number and what has been added, says so.

    All prompts are read up to the length of the shortest, then token by token: longer ones go on reading while shorter
    ones are continued, so no position is padding. Prompts of about one length are read fastest. Only tokens below
    `vocab_size` are drawn. `model` is to be in evaluation mode.

    Raises HvdlmError if the model computes NaN, or if a prompt with what is added does not fit into the context.
    """
    device = model.output_weight.device
    lengths = [len(prompt.tokens) for prompt in prompts]
    capacity = max(length + prompt.limit for length, prompt in zip(lengths, prompts, strict=True)) - 1
    cache = KeyValueCache(model, len(prompts), capacity)
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    added: list[list[int]] = [[] for _ in prompts]
    is_done = [prompt.limit == 0 for prompt in prompts]
    read = torch.tensor([list(prompt.tokens[: min(lengths)]) for prompt in prompts])  # (B, T), grows
    unread = read
    while not all(is_done):
        documents = None
        if model.config.document_mask:
            documents = document_ids(read, eos_id)[:, cache.length :].to(device)
        hidden = model(unread.to(device), documents, cache)  # (B, t, D)
        logits = model.logits(hidden[:, -1])[:, :vocab_size]  # (B, V)
        check_finite(logits)
        likeliest = logits.argmax(dim=-1).tolist()
        following = []
        for row, prompt in enumerate(prompts):
            if cache.length < lengths[row]:
                following.append(prompt.tokens[cache.length])
                continue
            if is_done[row]:
                following.append(eos_id)  # read and not looked at again
                continue
            token = (
                _draw(logits[row], prompt.sampling, generators[row]) if prompt.sampling.temperature else likeliest[row]
            )
            added[row].append(token)
            following.append(token)
            is_done[row] = token == eos_id or len(added[row]) == prompt.limit or is_complete(row, added[row])
        unread = torch.tensor(following)[:, None]
        read = torch.cat([read, unread], dim=1)
    return added


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """logits: (V,)."""
    probabilities = next_token_probabilities(logits, *sampling)
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
