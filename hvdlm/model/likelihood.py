"""How likely a model holds the ends of token sequences to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hvdlm.model.generate import check_finite
from hvdlm.model.loss import loss_chunk_tokens
from hvdlm.model.transformer import Transformer, document_ids


class Likelihood(NamedTuple):
    """Of the tokens that end a sequence, given those before them."""

    log_probability: float  # natural logarithm, summed over these tokens
    is_greedy: bool  # whether each of them is the likeliest token in its place


@torch.no_grad()
def likelihoods(
    model: Transformer, sequences: Sequence[Sequence[int]], counts: Sequence[int], eos_id: int
) -> list[Likelihood]:
    """Of the last `counts[i]` tokens of each sequence, which has more tokens than that, computed at once.

    Sequences of up to `context_length` + 1 tokens, padded at the right, where causal attention does not look; with
    `model.document_mask` attention stays within the documents that `eos_id` ends, as it did in training.

    Raises HvdlmError if the model computes NaN or infinite numbers.
    """
    device = model.output_weight.device
    length = max(map(len, sequences)) - 1  # the last token is not read, only predicted
    inputs = torch.full((len(sequences), length), eos_id, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        inputs[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
    inputs = inputs.to(device)
    documents = document_ids(inputs, eos_id) if model.config.document_mask else None
    hidden = model(inputs, documents)  # (B, T, D)
    chunk = loss_chunk_tokens(model.vocab_size, model.dtype.itemsize, device.type)
    results = []
    for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        end = len(sequence) - 1
        targets = torch.tensor(sequence[-count:], device=device)
        log_probabilities, are_likeliest = [], []
        for states, part in zip(hidden[row, end - count : end].split(chunk), targets.split(chunk), strict=True):
            logits = model.logits(states)  # (n, V)
            own = logits.gather(1, part[:, None]).squeeze(1)
            log_probabilities.append(own - logits.logsumexp(dim=-1))
            are_likeliest.append(logits.argmax(dim=-1) == part)
        total = torch.cat(log_probabilities).sum()
        check_finite(total)
        results.append(Likelihood(float(total), bool(torch.cat(are_likeliest).all())))
    return results
