"""Some input tokens of training are replaced by random ones: `data.token_dropout`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def replace_tokens(
    inputs: npt.NDArray[np.int64], share: float, key: tuple[int, int, int], vocab_size: int, end_of_text: int
) -> None:
    """Replaces each token of one sequence, (T,), with probability `share` by another token, all equally likely.

    `key`: seed, batch and place in it, on which alone the outcome depends, so not on the number of ranks. The end of
    text is neither replaced nor drawn, as it bounds documents.
    """
    generator = np.random.default_rng(key)
    chosen = (generator.random(len(inputs)) < share) & (inputs != end_of_text)
    drawn = generator.integers(vocab_size - 1, size=len(inputs))
    inputs[chosen] = (drawn + (drawn >= end_of_text))[chosen]
