"""The whole fast path (bf16 products, plain attention, compiled blocks, chunked loss) trains as the plain one does."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest
import torch
from hugging_face import hugging_face_gpt2
from torch import Tensor
from torch.nn import functional

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.gradients.sync import GradientSync
from hvdlm.model.loss import token_loss
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.optimizer import make_optimizer
from hvdlm.training.model import make_model

STEPS, SEQUENCES, LENGTH, VOCABULARY = 300, 8, 32, 97
LEARNING_RATE = 3e-3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, and they would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(seed: int) -> Config:
    chosen = {
        "model.layers": 2,
        "model.heads": 2,
        "model.width": 32,
        "model.context_length": LENGTH,
        "train.precision": "bf16",
        "train.compile": "true",
        "train.seed": seed,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.weight_decay": 0,
    }
    return load(None, [word for name, value in chosen.items() for word in (f"--{name}", str(value))], PRESETS)


def batches(seed: int) -> list[Tensor]:
    """Walks (B, T + 1) in which each token has 4 likely followers, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    tokens = torch.randint(VOCABULARY, (STEPS * SEQUENCES, 1), generator=generator)
    for _ in range(LENGTH):
        choice = torch.randint(4, (len(tokens), 1), generator=generator)
        tokens = torch.cat([tokens, followers[tokens[:, -1:], choice].view(-1, 1)], dim=1)
    return list(tokens.split(SEQUENCES))


def fast_losses(seed: int) -> list[float]:
    config = settings(seed)
    model = make_model(config, VOCABULARY, torch.device("cpu"))
    sync = GradientSync(model, SoloCommunicator(), config.comm, config.compression)
    optimizer = make_optimizer(model, config.optimizer)
    losses = []
    for tokens in batches(seed):
        sync.zero_grad()
        sync.set_last_micro_batch()
        loss = (
            token_loss(model(tokens[:, :-1]), model.output_weight, tokens[:, 1:], model.dtype) / tokens[:, 1:].numel()
        )
        loss.backward()
        sync.wait()
        optimizer.step()
        model.update_low_precision_weights()
        losses.append(loss.item())
    return losses


def plain_losses(seed: int, dtype: torch.dtype) -> list[float]:
    """Hugging Face's GPT-2 from the same weights, in fp32 or under autocast, by PyTorch's loss and optimizer."""
    ours = Transformer(settings(seed).model, VOCABULARY)
    ours.initialise(seed)
    model = hugging_face_gpt2(ours, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0)
    losses = []
    for tokens in batches(seed):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.thorough
def test_the_curve_differs_from_fp32_s_no_more_than_autocast_s_does() -> None:
    """Over 300 steps; the distance between fp32 and PyTorch's own bf16 is what bf16 is known to cost.

    Of one seed; benchmarks/fast_path.py trains with three.
    """
    exact, cast, fast = plain_losses(0, torch.float32), plain_losses(0, torch.bfloat16), fast_losses(0)
    assert exact[-1] < 0.6 * exact[0]  # it learned something
    noise = statistics.fmean(abs(a - b) for a, b in zip(exact, cast, strict=True))
    distance = statistics.fmean(abs(a - b) for a, b in zip(exact, fast, strict=True))
    assert 0 < distance < 2 * noise
    bias = statistics.fmean(b - a for a, b in zip(exact[-100:], fast[-100:], strict=True))
    assert abs(bias) < 0.005 * exact[-1]


def test_compiled_blocks_computed_again_give_the_same_gradients() -> None:
    config = settings(seed=0)
    gradients = []
    for checkpointing in (False, True):
        train = config.train.model_copy(update={"activation_checkpointing": checkpointing})
        model = make_model(config.model_copy(update={"train": train}), VOCABULARY, torch.device("cpu"))
        tokens = batches(0)[0]
        token_loss(model(tokens[:, :-1]), model.output_weight, tokens[:, 1:], model.dtype).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2 * float(one.abs().max()))
