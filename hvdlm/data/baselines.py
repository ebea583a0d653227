"""Cross-entropy of n-gram models of a data set: baselines that a trained model must beat."""

from __future__ import annotations

import numpy as np

from hvdlm.data.ngrams import KneserNey
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError

MAX_ORDER = 5


def ngram_baselines(data: DataSet) -> list[float]:
    """Of models of order 1 to MAX_ORDER, in nats per predicted token (all but the first of each shard).

    They are fitted to the training split (`KneserNey.fit`) and scored on the validation split, which is read in blocks.

    Raises HvdlmError if the validation split has no tokens to predict.
    """
    predicted = sum(shard.n_tokens - 1 for shard in data.validation.shards)
    if not predicted:
        raise HvdlmError(f"{data.path} has no validation tokens; prepare it with a larger --validation")
    model = KneserNey.fit(data.train, data.vocab_size, MAX_ORDER)
    context = MAX_ORDER - 1
    total = np.zeros(MAX_ORDER)
    for shard in range(len(data.validation.shards)):
        for number, block in enumerate(data.validation.blocks(shard, overlap=context)):
            probabilities = model.probabilities(block.astype(np.int64))
            total -= np.log(probabilities[:, context if number else 1 :]).sum(axis=1)
    return [float(each) / predicted for each in total]
