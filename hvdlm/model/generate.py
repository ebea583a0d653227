"""Continuing a prompt, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import KeyValueCache, Transformer, document_ids


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The prompt and up to `tokens` more; fewer if `eos_id` is drawn, which is then the last.

    prompt: (T,) int64. temperature, top_k, top_p: see `next_token_probabilities`. Equal arguments give equal
    tokens: they are drawn on the CPU by a generator seeded with `seed`. Of a prompt longer than the context
    the last `context_length` tokens are read. When the context is full, its last half is read again as the
    beginning of a new one. With `model.document_mask`, attention stays within the documents that `eos_id`
    ends, as it did in training. Dropout is off meanwhile. Only tokens below `vocab_size` are drawn: a model's
    vocabulary may be larger than its tokenizer's, for speed.

    Returns (T + n,) int64 on the prompt's device, the whole prompt included.
    Raises HvdlmError for an empty prompt, a token outside the vocabulary, a setting out of range, or a model that
    computes NaN.
    """
    _check(model, prompt, tokens, temperature, top_k, top_p)
    context = model.config.context_length
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(model, batch_size=1)
    sequence = prompt.to(model.output_weight.device)
    unread = sequence[-context:]
    was_training = model.training
    model.eval()
    try:
        for _ in range(tokens):
            if cache.length + len(unread) > context:
                cache.length = 0
                unread = sequence[-max(1, context // 2) :]
            documents = None
            if model.config.document_mask and eos_id is not None:
                window = sequence[None, -(cache.length + len(unread)) :]
                documents = document_ids(window, eos_id)[:, cache.length :]
            hidden = model(unread[None], documents, cache)  # (1, T, D)
            logits = model.logits(hidden[0, -1])[:vocab_size]
            check_finite(logits)
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
            unread = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(sequence.device)  # (1,)
            sequence = torch.cat([sequence, unread])
            if int(unread) == eos_id:
                break
    finally:
        model.train(was_training)
    return sequence.to(prompt.device)


def next_token_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What the next token is drawn from: (V,) logits to (V,) fp32 probabilities.

    temperature: logits are divided by it; 0 gives the likeliest token probability 1. top_k: only the k
    likeliest keep theirs (Fan et al. 2018, arXiv:1805.04833); 0 for all. top_p: of those, only the fewest
    likeliest whose sum reaches p (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); 1 for all.
    """
    logits = logits.float()
    if temperature == 0:
        top_k, temperature = 1, 1.0
    # Descending, so that both cuts keep a beginning; stable, so that of equals the first stays.
    scores, order = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    if top_k:
        scores[top_k:] = -torch.inf
    probabilities = scores.softmax(dim=0)
    if top_p < 1:
        probabilities[1:][probabilities.cumsum(dim=0)[:-1] >= top_p] = 0
        probabilities /= probabilities.sum()
    return torch.zeros_like(probabilities).scatter_(0, order, probabilities)


def check_finite(numbers: Tensor) -> None:
    """Raises HvdlmError if a model has computed numbers that are not finite."""
    if not bool(torch.isfinite(numbers).all()):
        raise HvdlmError("the model computes NaN or infinite numbers: it has diverged; take another checkpoint")


def _check(model: Transformer, prompt: Tensor, tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if len(prompt) == 0:
        raise HvdlmError("the prompt is empty: give at least one token, such as the end of text, to begin after")
    if int(prompt.min()) < 0 or int(prompt.max()) >= model.vocab_size:
        raise HvdlmError(
            f"the prompt holds a token outside 0 to {model.vocab_size - 1}, the model's vocabulary: "
            "encode it with the tokenizer that the model was trained with"
        )
    check_sampling(tokens, temperature, top_k, top_p)


def check_sampling(tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raises HvdlmError for a number of tokens below 1, or a setting of `next_token_probabilities` out of range."""
    if tokens < 1:
        raise HvdlmError(f"tokens = {tokens} to generate: give 1 or more")
    if not 0 <= temperature < math.inf:
        raise HvdlmError(f"temperature = {temperature}: give 0 for the likeliest token, or a positive number")
    if top_k < 0:
        raise HvdlmError(f"top_k = {top_k}: give how many of the likeliest tokens to draw from, or 0 for all")
    if not 0 < top_p <= 1:
        raise HvdlmError(f"top_p = {top_p}: give a probability above 0 and at most 1; 1 for all tokens")
