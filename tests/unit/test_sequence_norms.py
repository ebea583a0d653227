"""Norms and clipped sums of the gradients of sequences against torch.func, which makes the gradient of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from hvdlm.config import ModelSection
from hvdlm.model.transformer import Transformer
from hvdlm.privacy import sequence_norms
from hvdlm.privacy.model import RecordedTransformer
from hvdlm.targets import IGNORE

VOCABULARY, LENGTH, SEQUENCES = 61, 12, 5
FACTOR = 0.25
GPT2: dict[str, Any] = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False, "kv_heads": 2}


def section(**changes: Any) -> ModelSection:
    shape = {"layers": 2, "heads": 4, "width": 32, "context_length": 16}
    return ModelSection.model_validate({**shape, **changes})


def batch(sequences: int = SEQUENCES) -> tuple[Tensor, Tensor]:
    """Few different tokens, so that each occurs several times in a sequence; some targets do not count."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (sequences, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[1, 4:] = IGNORE
    return tokens[:, :-1], targets


def models(config: ModelSection) -> tuple[RecordedTransformer, Transformer]:
    """Of the same parameters; weights are large enough for all parts to matter."""
    recorded, plain = RecordedTransformer(config, VOCABULARY), Transformer(config, VOCABULARY)
    recorded.initialise(5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in recorded.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
    plain.load_state_dict(recorded.state_dict())
    return recorded, plain


def gradients_by_vmap(plain: Transformer, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of each parameter, (b, *its shape): of FACTOR times the sum of each sequence's loss."""
    own = {name: each.detach() for name, each in plain.named_parameters()}

    def loss(parameters: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = functional_call(plain, parameters, (tokens[None],))[0]  # (T, D)
        matrix = parameters["token_embedding.weight" if plain.output is None else "output.weight"]
        losses = functional.cross_entropy(hidden @ matrix.T, targets, ignore_index=IGNORE, reduction="sum")
        return losses * FACTOR

    return dict(vmap(grad(loss), in_dims=(None, 0, 0))(own, inputs, targets))


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits made again"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "kind", [GPT2, LLAMA, {**GPT2, "qkv_bias": True, "bias": False}], ids=["gpt2", "llama", "mixed"]
)
def test_norms_and_weighted_sums(kind: dict[str, Any], tied: bool, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, plain = models(section(tie_embeddings=tied, **kind))
    inputs, targets = batch()
    if not kept:  # two sequences at once, so that the last part is a short one
        monkeypatch.setattr("hvdlm.privacy.output_layer.loss_chunk_tokens", lambda *_: 2 * LENGTH + 1)
    expected = gradients_by_vmap(plain, inputs, targets)
    assert expected.keys() == dict(recorded.named_parameters()).keys()
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in expected.values()]).norm(dim=0)  # (b,)

    loss = recorded.token_loss(recorded(inputs), targets)
    plain_loss = plain.token_loss(plain(inputs), targets)
    assert abs(loss / plain_loss - 1) < 1e-6
    pass_ = recorded.record(loss, FACTOR)
    assert all(parameter.grad is None for parameter in recorded.parameters())
    assert ((pass_.squared_norms().sqrt() - norms) / norms).abs().max() < 1e-5

    factors = torch.tensor([0.5, 1.0, 0.0, 0.25, 2.0])
    found = list(pass_.gradients(factors))
    assert len(found) == len(expected)
    names = {parameter: name for name, parameter in recorded.named_parameters()}
    for parameter, gradient in found:
        own = expected[names[parameter]]
        wanted = torch.einsum("b,b...->...", factors, own)
        assert gradient.shape == parameter.shape
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), names[parameter]


@pytest.mark.parametrize("shape", [(200, 8, 8), (70, 96, 160), (5, 300, 200)], ids=str)
def test_norms_of_a_matrix(shape: tuple[int, int, int]) -> None:
    """By pairs of tokens and by parts of the matrix, whichever takes less arithmetic: long, in several blocks, wide."""
    length, width, outputs = shape
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(3, length, width, generator=generator)
    grads = torch.randn(3, length, outputs, generator=generator)
    whole = (grads.double().mT @ inputs.double()).square().sum(dim=(1, 2))
    for squares in (
        sequence_norms.of_matrix(inputs, grads),
        sequence_norms._by_pairs(inputs, grads, sequence_norms._blocks(length, 4)),
        sequence_norms._by_parts(inputs, grads),
    ):
        assert (squares / whole - 1).abs().max() < 1e-5


def test_what_is_not_finite_is_left_out() -> None:
    """A sequence of NaN has no part in the sum; the others have theirs."""
    recorded, plain = models(section(**GPT2))
    inputs, targets = batch()
    expected = gradients_by_vmap(plain, inputs, targets)
    pass_ = recorded.record(recorded.token_loss(recorded(inputs), targets), FACTOR)
    for _, grads in pass_._of_layers:
        for each in grads:
            each[3] = torch.nan
    pass_._output_layer._logit_grads[0][3] = torch.inf  # type: ignore[index]
    without = torch.arange(SEQUENCES) == 3
    pass_.leave_out(without)
    names = {parameter: name for name, parameter in recorded.named_parameters()}
    for parameter, gradient in pass_.gradients(torch.ones(SEQUENCES)):
        wanted = expected[names[parameter]][~without].sum(dim=0)
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), names[parameter]


def test_without_gradients_it_is_a_transformer() -> None:
    recorded, plain = models(section(**LLAMA))
    inputs, targets = batch()
    recorded(inputs)
    with torch.no_grad():
        assert torch.equal(recorded(inputs), plain(inputs))
        assert torch.equal(recorded.token_loss(recorded(inputs), targets), plain.token_loss(plain(inputs), targets))


@pytest.mark.parametrize("kind", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_gradients_with_activation_checkpointing(kind: dict[str, Any]) -> None:
    recorded, _ = models(section(**kind))
    inputs, targets = batch()
    found = []
    for recomputes in (False, True):
        recorded.activation_checkpointing = recomputes
        pass_ = recorded.record(recorded.token_loss(recorded(inputs), targets), FACTOR)
        found.append([pass_.squared_norms(), *(each for _, each in pass_.gradients(torch.ones(SEQUENCES)))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_gradients_of_compiled_blocks(kind: dict[str, Any]) -> None:
    """As torch.compile traces them, forward and backward; parts of batches have unlike numbers of sequences."""
    recorded, _ = models(section(**kind))
    inputs, targets = batch()

    def of_sequences(count: int) -> list[Tensor]:
        pass_ = recorded.record(recorded.token_loss(recorded(inputs[:count]), targets[:count]), FACTOR)
        return [pass_.squared_norms(), *(each for _, each in pass_.gradients(torch.ones(count)))]

    eager = {count: of_sequences(count) for count in (5, 2, 3)}
    assert not any(each.requires_grad for each in eager[5])
    for block in recorded.blocks:
        block.compile(backend="aot_eager")
    for count, expected in eager.items():
        for own, other in zip(of_sequences(count), expected, strict=True):
            assert (own - other).norm() <= 1e-5 * other.norm()


def test_matrices_of_a_factor_of_1_are_those_of_autograd_bit_for_bit() -> None:
    recorded, plain = models(section(**LLAMA, tie_embeddings=False))
    inputs, targets = batch()
    (plain.token_loss(plain(inputs), targets) * FACTOR).backward()
    pass_ = recorded.record(recorded.token_loss(recorded(inputs), targets), FACTOR)
    of_plain = dict(plain.named_parameters())
    names = {parameter: name for name, parameter in recorded.named_parameters()}
    compared = [
        torch.equal(gradient, of_plain[names[parameter]].grad)  # type: ignore[arg-type]
        for parameter, gradient in pass_.gradients(torch.ones(SEQUENCES))
        if names[parameter].startswith("blocks") and parameter.dim() == 2
    ]
    assert len(compared) == 8 and all(compared)
