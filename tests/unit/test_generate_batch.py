"""Prompts that are continued together go on as each would alone, without a cache."""

from __future__ import annotations

import pytest
import torch
from test_generate import GPT2, LLAMA, VOCABULARY, make, without_cache

from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.model.generate_batch import Prompt, Sampling, generate_batch

EOS = 7


def prompts(lengths: list[int], limits: list[int], sampling: Sampling) -> list[Prompt]:
    numbers = torch.Generator().manual_seed(9)
    tokens = [torch.randint(0, VOCABULARY, (length,), generator=numbers).tolist() for length in lengths]
    return [Prompt(text, limit, sampling, seed) for seed, (text, limit) in enumerate(zip(tokens, limits, strict=True))]


def alone(config: ModelSection, prompt: Prompt) -> list[int]:
    settings = {**prompt.sampling._asdict(), "seed": prompt.seed}
    found = without_cache(make(config).double(), torch.tensor(prompt.tokens), prompt.limit, EOS, **settings)
    return found.tolist()[len(prompt.tokens) :]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, 10, 0.9)], ids=["greedy", "all", "top"])
@pytest.mark.parametrize("document_mask", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_together_as_alone(config: ModelSection, document_mask: bool, sampling: Sampling) -> None:
    """Of unequal lengths and limits; one prompt holds the end of a document, one fills the context."""
    config = config.model_copy(update={"document_mask": document_mask})
    wanted = prompts([3, 1, 9, 3, 16], [8, 15, 2, 0, 1], sampling)
    wanted[2] = wanted[2]._replace(tokens=[*wanted[2].tokens[:4], EOS, *wanted[2].tokens[5:]])
    added = generate_batch(make(config).double().eval(), wanted, EOS, VOCABULARY)
    assert added == [alone(config, prompt) for prompt in wanted]
    assert any(len(each) == prompt.limit > 1 for each, prompt in zip(added, wanted, strict=True))


def test_ends() -> None:
    """At the end of text, which is the last token, and where `is_complete` says so."""
    model = make(GPT2).double().eval()
    [first, second] = [each._replace(limit=9) for each in prompts([2, 4], [9, 9], Sampling())]
    [whole, other] = generate_batch(model, [first, second], VOCABULARY - 1, VOCABULARY)
    end = whole[4]
    assert generate_batch(model, [first], end, VOCABULARY) == [whole[: whole.index(end) + 1]]

    def is_complete(row: int, added: object) -> bool:
        assert isinstance(added, list)
        return row == 1 and len(added) == 3

    assert generate_batch(model, [first, second], VOCABULARY - 1, VOCABULARY, is_complete) == [whole, other[:3]]


def test_a_prompt_that_does_not_fit() -> None:
    with pytest.raises(HvdlmError, match=r"a sequence of 17 tokens does not fit into model\.context_length = 16"):
        generate_batch(make(GPT2).eval(), prompts([14], [5], Sampling()), EOS, VOCABULARY)


def test_a_model_that_has_diverged() -> None:
    model = make(GPT2).eval()
    with torch.no_grad():
        model.output_weight.fill_(torch.nan)
    with pytest.raises(HvdlmError, match="the model computes NaN or infinite numbers"):
        generate_batch(model, prompts([2], [5], Sampling()), EOS, VOCABULARY)
