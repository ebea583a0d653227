"""`hvdlm generate --ngram`: text by an n-gram model of a data set, beside which a trained model's can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hvdlm.data.baselines import MAX_ORDER
from hvdlm.data.ngrams import KneserNey
from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.model.generate import check_sampling, next_token_probabilities
from hvdlm.training.inference import encode_prompt


def generate_by_ngrams(
    data_path: Path, order: int, prompt: str, tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> int:
    """Prints `prompt` and what follows it by the model of an order, up to the end of the document."""
    if not 1 <= order <= MAX_ORDER:
        raise HvdlmError(f"--ngram {order}: give an order from 1 to {MAX_ORDER}")
    check_sampling(tokens, temperature, top_k, top_p)
    data = DataSet(data_path)
    tokenizer = Tokenizer.load(data.tokenizer_path)
    model = KneserNey.fit(data.train, data.vocab_size, order)
    generator = torch.Generator().manual_seed(seed)
    written = encode_prompt(tokenizer, prompt)
    for _ in range(tokens):
        logits = torch.from_numpy(np.log(model.distribution(written[-(order - 1) :] if order > 1 else [])))
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
        written.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if written[-1] == tokenizer.eos_id:
            break
    print(tokenizer.decode([token for token in written if token != tokenizer.eos_id]))
    return 0
