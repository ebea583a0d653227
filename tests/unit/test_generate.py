"""Sampling by hand; generation with the cache against generation without."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from forked import hvdlm
from torch import Tensor

from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.model.generate import generate, next_token_probabilities
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.retention import Retention

VOCABULARY = 61
GPT2 = ModelSection(layers=2, heads=2, width=16, context_length=16)
LLAMA = ModelSection(
    layers=2,
    heads=4,
    kv_heads=2,
    width=32,
    context_length=16,
    norm="rmsnorm",
    activation="swiglu",
    position="rope",
    bias=False,
)
# Probabilities 0.05, 0.4, 0.1, 0.3, 0.15.
LOGITS = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15]).log() + 3.0


def make(config: ModelSection) -> Transformer:
    """With weights large enough that the next token depends on the previous ones."""
    model = Transformer(config, VOCABULARY)
    model.initialise(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10
    return model


def without_cache(model: Transformer, prompt: Tensor, tokens: int, eos_id: int | None = None, **sampling) -> Tensor:
    """Every token from the whole window anew, the window moving as `generate` documents."""
    seed = sampling.pop("seed")
    context = model.config.context_length
    generator = torch.Generator().manual_seed(seed)
    sequence = prompt.tolist()
    first = max(0, len(sequence) - context)
    for _ in range(tokens):
        if len(sequence) - first > context:
            first = len(sequence) - context // 2
        window = torch.tensor([sequence[first:]])
        documents = document_ids(window, eos_id) if model.config.document_mask else None
        with torch.no_grad():
            logits = model.logits(model(window, documents))[0, -1]
        probabilities = next_token_probabilities(logits, **sampling)
        sequence.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if sequence[-1] == eos_id:
            break
    return torch.tensor(sequence)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 23], ids=lambda length: f"prompt-{length}")
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
    ],
    ids=["greedy", "sampled", "top"],
)
def test_with_cache_equals_without(config, prompt_length, sampling):
    """40 tokens through a context of 16: the window moves several times."""
    model = make(config)
    prompt = torch.randint(VOCABULARY, (prompt_length,), generator=torch.Generator().manual_seed(2))
    text = generate(model, prompt, 40, seed=5, **sampling)
    assert text.shape == (prompt_length + 40,)
    assert text.dtype == torch.int64
    assert torch.equal(text[:prompt_length], prompt)
    assert torch.equal(text, without_cache(model, prompt, 40, seed=5, **sampling))


def test_document_mask_hides_what_ended_before():
    model = make(LLAMA.model_copy(update={"document_mask": True}))
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3}
    prompt = torch.tensor([7, 8, 9, 0, 5])
    text = generate(model, prompt, 30, eos_id=0, **sampling)
    assert torch.equal(text, without_cache(model, prompt, 30, eos_id=0, **sampling))
    # Without learned positions, the document after the end of text is all that matters until the window moves.
    other = torch.tensor([1, 2, 3, 0, 5])
    assert torch.equal(generate(model, other, 8, eos_id=0, **sampling)[4:13], text[4:13])


def test_same_seed_same_text():
    model = make(GPT2)
    prompt = torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    first = generate(model, prompt, 30, 1.0, 0, 1.0, seed=1)
    torch.manual_seed(1)
    assert torch.equal(generate(model, prompt, 30, 1.0, 0, 1.0, seed=1), first)
    assert not torch.equal(generate(model, prompt, 30, 1.0, 0, 1.0, seed=2), first)


def test_stops_after_end_of_text():
    model = make(GPT2)
    prompt = torch.tensor([1, 2, 3])
    endless = generate(model, prompt, 30, 1.0, 0, 1.0, seed=1)
    eos_id = int(endless[10])
    end = endless[3:].tolist().index(eos_id) + 4
    assert torch.equal(generate(model, prompt, 30, 1.0, 0, 1.0, seed=1, eos_id=eos_id), endless[:end])


def test_dropout_is_off_and_training_mode_comes_back():
    model = make(GPT2.model_copy(update={"dropout": 0.5})).train()
    prompt = torch.tensor([1, 2, 3])
    text = generate(model, prompt, 20, 0.0, 0, 1.0, seed=0)
    assert model.training
    assert torch.equal(text, generate(make(GPT2), prompt, 20, 0.0, 0, 1.0, seed=0))


def test_context_of_one_token():
    model = make(GPT2.model_copy(update={"context_length": 1}))
    text = generate(model, torch.tensor([4, 5]), 6, 0.0, 0, 1.0, seed=0)
    for previous, following in itertools.pairwise(text[1:]):
        assert model.logits(model(previous.view(1, 1)))[0, 0].argmax() == following


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.05, 0.4, 0.1, 0.3, 0.15]),
        (0.0, 0, 1.0, [0, 1, 0, 0, 0]),
        (1.0, 1, 1.0, [0, 1, 0, 0, 0]),
        (1.0, 2, 1.0, [0, 4 / 7, 0, 3 / 7, 0]),
        (1.0, 99, 1.0, [0.05, 0.4, 0.1, 0.3, 0.15]),
        (1.0, 0, 0.01, [0, 1, 0, 0, 0]),
        (1.0, 0, 0.39, [0, 1, 0, 0, 0]),
        (1.0, 0, 0.41, [0, 4 / 7, 0, 3 / 7, 0]),
        (1.0, 0, 0.8, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (1.0, 0, 0.94, [0, 8 / 19, 2 / 19, 6 / 19, 3 / 19]),
        # top_p is of what top_k leaves: 4/7 reaches 0.5.
        (1.0, 2, 0.5, [0, 1, 0, 0, 0]),
        # At temperature 1/2 probabilities are squared: 0.25, 16, 1, 9 and 2.25 hundredths, of 28.5.
        (0.5, 0, 1.0, [1 / 114, 64 / 114, 4 / 114, 36 / 114, 9 / 114]),
        (0.5, 2, 1.0, [0, 16 / 25, 0, 9 / 25, 0]),
        (1e-40, 0, 1.0, [0, 1, 0, 0, 0]),
    ],
)
def test_probabilities_by_hand(temperature, top_k, top_p, expected):
    probabilities = next_token_probabilities(LOGITS, temperature, top_k, top_p)
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5)


def test_of_equals_the_first_stays():
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert next_token_probabilities(logits, 0.0, 0, 1.0).tolist() == [0, 1, 0, 0]
    assert next_token_probabilities(logits, 1.0, 2, 1.0).tolist() == [0, 0.5, 0.5, 0]


def test_draws_have_the_probabilities_asked_for():
    """First tokens of 300 seeds; none but the two likeliest, in their proportion within 5 standard errors."""
    model = make(GPT2)
    prompt = torch.tensor([3, 1])
    with torch.no_grad():
        likeliest = model.logits(model(prompt[None]))[0, -1].softmax(dim=0).topk(2)
    share = float(likeliest.values[0] / likeliest.values.sum())
    draws = [int(generate(model, prompt, 1, 1.0, 2, 1.0, seed=seed)[-1]) for seed in range(300)]
    assert set(draws) <= set(likeliest.indices.tolist())
    frequency = draws.count(int(likeliest.indices[0])) / 300
    assert abs(frequency - share) < 5 * math.sqrt(share * (1 - share) / 300)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "the prompt is empty"),
        ({"prompt": torch.tensor([1, VOCABULARY])}, "outside 0 to 60.*tokenizer"),
        ({"prompt": torch.tensor([-1])}, "outside 0 to 60"),
        ({"tokens": 0}, "tokens = 0"),
        ({"temperature": -0.1}, r"temperature = -0\.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.5}, r"top_p = 1\.5"),
        ({"top_p": math.nan}, "top_p = nan"),
    ],
)
def test_bad_values_are_errors(changed, message):
    settings = {"prompt": torch.tensor([1]), "tokens": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    with pytest.raises(HvdlmError, match=message):
        generate(make(GPT2), **{**settings, **changed})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the run directory `run` of a model that was trained for one step."""
    folder = tmp_path_factory.mktemp("generate")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"Document {number} is here to be learned, at last.")
    (folder / "config.toml").write_text(
        """
        model = { layers = 1, heads = 2, width = 16, context_length = 16 }
        data = { path = "data" }
        train = { steps = 1, global_batch_size = 2, run_dir = "run" }
        optimizer = { warmup_steps = 0 }
        comm = { engine = "solo" }
        """
    )
    prepared = hvdlm(
        "prepare", "--input", "*.txt", "--output", "data", "--shards", "1", "--validation", "0.2", cwd=folder
    )
    assert prepared.returncode == 0, prepared.stderr
    training = hvdlm("train", "config.toml", cwd=folder)
    assert training.returncode == 0, training.stderr
    return folder


def test_command_continues_a_prompt(trained):
    first, second = (hvdlm("generate", "run", "--prompt", "Document", "--tokens", "9", cwd=trained) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Document")
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--temperature", "-1", "temperature"),
        ("--top-k", "-3", "top_k"),
        ("--top-p", "0", "top_p"),
        ("--tokens", "0", "tokens"),
    ],
)
def test_command_names_the_bad_value(trained, flag, value, message):
    result = hvdlm("generate", "run", f"{flag}={value}", cwd=trained)
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert "error: " in lines[0]
    assert f"{message} = {value}" in lines[0]


def test_only_words_of_the_tokenizer_are_drawn():
    """A vocabulary of 61, of which the tokenizer has 7: without the limit nearly all tokens would be above."""
    settings = {"tokens": 30, "temperature": 5.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    drawn = generate(make(GPT2), torch.tensor([1]), **settings, vocab_size=7)
    assert len(drawn) == 31
    assert int(drawn.max()) < 7


def test_a_vocabulary_larger_than_the_tokenizer_s(trained):
    """Of bytes, 257: all 40 tokens are text."""
    options = ["--model.vocab_size", "5056", "--train.run_dir", "large"]
    training = hvdlm("train", "config.toml", *options, cwd=trained)
    assert training.returncode == 0, training.stderr
    done = hvdlm("generate", "large", "--prompt", "a", "--tokens", "40", "--seed", "3", cwd=trained)
    assert done.returncode == 0, done.stderr
    # at most 3 bytes make a character, and one token may be the end of text
    assert len(done.stdout) > 40 / 4


def test_a_prompt_that_is_not_utf_8(trained):
    result = hvdlm("generate", "run", "--prompt", "caf\udce9", cwd=trained)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "hvdlm: error: --prompt is not UTF-8: 'caf\\udce9'\n"


def test_a_model_that_has_diverged(trained):
    """Weights that are not finite are refused by name; so is what overflows on the way."""
    model = make(GPT2)
    with torch.no_grad():
        model.output_weight.fill_(1e38)
    settings = {"tokens": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    with pytest.raises(HvdlmError, match="NaN or infinite numbers: it has diverged"):
        generate(model, torch.tensor([1]), **settings)
    shutil.copytree(trained / "run", trained / "diverged")
    parent = trained / "diverged" / "checkpoints"
    (path,) = parent.glob("step_*")
    opened = Checkpoint(path)
    weights = {name: tensor.fill_(math.nan) for name, tensor in opened.model().items()}
    tokenizer = (path / "tokenizer.json").read_bytes()
    checkpoint.save(parent, 1, weights, opened.optimizer(), opened.state, tokenizer, keep=Retention(1))
    commands = [["generate", "diverged"], ["evaluate", "diverged", "--data", "data"]]
    commands.append(["train", "config.toml", "--train.run_dir", "diverged", "--resume", "latest"])
    for words in commands:
        result = hvdlm(*words, cwd=trained)
        assert (result.returncode, result.stdout) == (1, "")
        errors = [line for line in result.stderr.splitlines() if "error: " in line]
        assert len(errors) == 1, result.stderr
        assert "step_00000001 is of no use: " in errors[0] and "holds NaN" in errors[0]
        assert "Traceback" not in result.stderr
