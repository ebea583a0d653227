"""The Transformer against Hugging Face's GPT-2 and Llama, and against itself taken apart."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hugging_face import gpt2_weights, hugging_face_gpt2, hugging_face_llama, llama_weights
from torch import Tensor
from torch.nn import functional

from hvdlm.config import ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.model.attention import _has_flash_attention, causal_attention, repeats_key_value_heads
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import KeyValueCache, Transformer, document_ids

VOCABULARY = 97
GPT2 = ModelSection(layers=3, heads=4, width=32, context_length=24)
LLAMA = ModelSection(
    layers=3,
    heads=4,
    kv_heads=2,
    width=32,
    mlp_width=48,
    context_length=24,
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="swiglu",
    position="rope",
    rope_theta=500.0,
    bias=False,
    tie_embeddings=False,
)


def make(config: ModelSection, seed: int = 0) -> Transformer:
    """A model whose every parameter, norms and biases included, differs from its neutral value."""
    model = Transformer(config, VOCABULARY)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


REFERENCES = [
    pytest.param(GPT2, hugging_face_gpt2, id="gpt2"),
    pytest.param(LLAMA, hugging_face_llama, id="llama"),
    pytest.param(LLAMA.model_copy(update={"tie_embeddings": True}), hugging_face_llama, id="llama-tied"),
]


@pytest.mark.parametrize(("config", "build"), REFERENCES)
def test_logits_loss_and_gradients_equal_hugging_face(config, build):
    model = make(config)
    reference = build(model, VOCABULARY)
    tokens = draw_tokens(2, config.context_length)

    hidden = model(tokens)
    theirs = reference(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(model.logits(hidden), theirs.logits, atol=1e-5, rtol=1e-5)

    # Their loss is the mean over tokens 1 to T - 1 of each sequence.
    count = 2 * (config.context_length - 1)
    loss = token_loss(hidden[:, :-1], model.output_weight, tokens[:, 1:]) / count
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    mapped = gpt2_weights(gradients, config.layers) if config.bias else llama_weights(gradients, config)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert expected.keys() <= mapped.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            mapped[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_no_token_sees_a_later_one(config):
    model = make(config)
    tokens = draw_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert all((before[0, position] - after[0, position]).abs().max() > 1e-3 for position in range(7, 12))


def test_document_ids_by_hand():
    tokens = torch.tensor([[5, 0, 3, 4, 0, 0, 7], [0, 1, 1, 1, 1, 1, 0]])
    expected = torch.tensor([[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(document_ids(tokens, eos_id=0), expected)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_documents_in_one_sequence_equal_each_on_its_own(config):
    """RoPE knows relative positions only. Learned ones count from the start of the sequence, so that a document
    on its own is run by a model whose first positions are those it had in the sequence."""
    model = make(config)
    tokens = draw_tokens(2, 20).clamp_(min=1)
    lengths = [(6, 9, 5), (1, 12, 7)]
    for row, (first, second, _) in enumerate(lengths):
        tokens[row, first - 1] = tokens[row, first + second - 1] = 0
    packed = model(tokens, document_ids(tokens, eos_id=0))
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            alone = tokens[row : row + 1, start : start + length]
            if config.position == "rope":
                expected = model(alone)
            else:
                shifted = make(config)
                with torch.no_grad():
                    shifted.position_embedding.weight[:length] = model.position_embedding.weight[start : start + length]
                expected = shifted(alone)
            torch.testing.assert_close(packed[row : row + 1, start : start + length], expected, atol=2e-6, rtol=1e-5)
            start += length
    assert (packed[0] - model(tokens)[0]).abs().max() > 1e-2  # the mask does something


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
def test_cache_in_pieces_equals_whole(config, documents):
    model = make(config)
    tokens = draw_tokens(2, 20)
    tokens[0, 5] = tokens[1, 11] = 0
    ids = document_ids(tokens, eos_id=0) if documents else None
    whole = model(tokens, ids)
    cache = KeyValueCache(model, batch_size=2)
    pieces = [
        model(tokens[:, start:end], None if ids is None else ids[:, start:end], cache)
        for start, end in [(0, 7), (7, 8), (8, 9), (9, 14), (14, 20)]
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-6, rtol=1e-5)
    assert cache.length == 20
    assert cache.keys.shape == (3, 2, 2 if config is LLAMA else 4, 24, 8)


def test_too_long_a_sequence_is_an_error():
    model = make(GPT2)
    with pytest.raises(HvdlmError, match=r"25 tokens.*model\.context_length = 24"):
        model(draw_tokens(1, 25))
    cache = KeyValueCache(model, batch_size=1)
    model(draw_tokens(1, 20), cache=cache)
    with pytest.raises(HvdlmError, match="25 tokens"):
        model(draw_tokens(1, 5), cache=cache)
    assert cache.length == 20


def test_initialisation_statistics():
    config = ModelSection(layers=8, heads=4, width=128, context_length=64, activation="swiglu", tie_embeddings=False)
    model = Transformer(config, 1000)
    model.initialise(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
            continue
        # 2 x 8 layers: 0.02 / sqrt(16). The estimate of a deviation from n draws has a standard error of 1 / sqrt(2n).
        into_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        deviation = 0.005 if into_residual else 0.02
        count = parameter.numel()
        assert abs(parameter.std().item() / deviation - 1) < 5 / (2 * count) ** 0.5, name
        assert abs(parameter.mean().item()) < 5 * deviation / count**0.5, name


def test_initialisation_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = Transformer(LLAMA, VOCABULARY)
    first.initialise(3)
    torch.manual_seed(2)
    with torch.device("meta"):
        second = Transformer(LLAMA, VOCABULARY)
    second.to_empty(device="cpu")
    state = torch.get_rng_state()
    second.initialise(3)
    assert torch.equal(torch.get_rng_state(), state)
    other = Transformer(LLAMA, VOCABULARY)
    other.initialise(4)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.ndim == 1 or not torch.equal(one, three), name


def test_first_loss_is_that_of_a_uniform_guess():
    model = Transformer(GPT2, VOCABULARY)
    model.initialise(0)
    tokens = draw_tokens(8, 24)
    loss = token_loss(model(tokens)[:, :-1], model.output_weight, tokens[:, 1:]).item() / (8 * 23)
    assert loss == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=0.05)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_reverse_registration_order_is_backward_order(config):
    """Buckets are filled in reverse order: none must wait for a parameter of another part of the model."""
    model = make(config)
    completed: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: completed.append(name))
    tokens = draw_tokens(1, 8)
    token_loss(model(tokens), model.output_weight, tokens).backward()

    def parts(names: list[str]) -> list[str]:
        """Consecutive names of one norm, attention or MLP as one; embeddings, both of which come last, likewise."""
        labels = ["embedding" if "embedding" in name else ".".join(name.split(".")[:3]) for name in names]
        return [label for label, _ in itertools.groupby(label.replace(".weight", "") for label in labels)]

    expected = parts([name for name, _ in model.named_parameters()][::-1])
    norms = [label for label in expected if "final_norm" in label]
    assert len(norms) >= 1
    assert parts([name for name in completed if "final_norm" not in name]) == [
        label for label in expected if label not in norms
    ]
    assert "final_norm" in completed[0] or completed[0] == "output.weight"


def test_dropout_only_in_training():
    model = make(GPT2.model_copy(update={"dropout": 0.5}))
    plain = make(GPT2)
    tokens = draw_tokens(2, 16)
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(0)
    first = model(tokens)
    torch.manual_seed(0)
    assert torch.equal(model(tokens), first)
    assert not torch.equal(model(tokens), first)


def pytorchs_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: None, dropout: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        queries, keys, values, dropout_p=dropout, is_causal=True, enable_gqa=keys.shape[1] != queries.shape[1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_products_in_16_bits_are_as_near_as_autocasts(config, dtype, monkeypatch):
    """Hidden states, loss and gradients against fp32, where PyTorch's own autocast, attention and loss measure."""
    tokens = draw_tokens(2, 24)
    exact, low, cast = make(config), make(config), make(config)
    low.set_compute_dtype(dtype)
    outcomes = []
    for model in (low, exact, cast):
        if model is not low:
            monkeypatch.setattr("hvdlm.model.transformer.causal_attention", pytorchs_attention)
        with torch.autocast("cpu", dtype=dtype, enabled=model is cast):
            hidden = model(tokens)
            if model is low:
                loss = token_loss(hidden, model.output_weight, tokens, dtype)
            else:
                logits = functional.linear(hidden, model.output_weight).flatten(0, 1)
                loss = functional.cross_entropy(logits.float(), tokens.flatten(), reduction="sum")
        loss.backward()
        assert hidden.dtype == loss.dtype == torch.float32
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        outcomes.append([hidden.detach(), loss.detach(), *gradients])
    for ours, wanted, theirs in zip(*outcomes, strict=True):
        assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GPT2.model_copy(update={"dropout": 0.1}), LLAMA], ids=["gpt2", "llama"])
def test_computing_blocks_again_changes_no_bit_and_keeps_less(config, dtype):
    model, tokens = make(config).train(), draw_tokens(2, 24)
    model.set_compute_dtype(dtype)
    gradients, kept = [], []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        storages = {}  # tensors are held, so that no address is used twice

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(tokens)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
        token_loss(hidden, model.output_weight, tokens, dtype).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_changed_parameters_count_once_they_are_told():
    model, tokens = make(GPT2), draw_tokens(2, 24)
    model.set_compute_dtype(torch.bfloat16)
    before = model(tokens)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1.5)
    model.update_low_precision_weights()
    fresh = Transformer(model.config, model.vocab_size)
    fresh.load_state_dict(model.state_dict())
    fresh.set_compute_dtype(torch.bfloat16)
    assert torch.equal(model(tokens), fresh(tokens))
    assert not torch.equal(model(tokens), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "key_value_heads"), [(2, 4), (24, 4), (256, 2), (300, 1), (512, 4)])
def test_plain_attention_against_pytorchs_in_fp32(length, key_value_heads, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 8) for heads in (4, key_value_heads, key_value_heads)]
    low = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    high = [tensor.detach().float().requires_grad_() for tensor in low]
    ours = causal_attention(*low, mask=None, dropout=0.0)
    theirs = functional.scaled_dot_product_attention(*high, is_causal=True, enable_gqa=key_value_heads != 4)
    weights = torch.randn(theirs.shape, generator=generator)
    (ours.float() * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert ours.dtype == dtype
    assert (ours.float() - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm()
    for mine, exact in zip(low, high, strict=True):
        assert (mine.grad.float() - exact.grad).norm() < 8 * torch.finfo(dtype).eps * exact.grad.norm()


@pytest.mark.parametrize(
    ("device", "is_low", "has_mask", "repeats"),
    [
        ("cpu", False, True, False),
        ("cuda", True, False, False),
        ("cuda", True, True, True),
        ("cuda", False, False, True),
    ],
)
def test_where_key_and_value_heads_are_copied(device, is_low, has_mask, repeats):
    assert repeats_key_value_heads(device, is_low, has_mask) == repeats


@pytest.mark.parametrize("has_mask", [False, True])
def test_copied_heads_attend_as_grouped_ones_do(has_mask, monkeypatch):
    """And PyTorch is not asked for grouped heads, for which its efficient kernels would not serve."""
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn((2, heads, 24, 8), generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    mask = torch.zeros(2, 1, 24, 24).masked_fill_(torch.ones(24, 24).triu(1).bool(), -torch.inf) if has_mask else None
    asked, outcomes = [], []
    plain = functional.scaled_dot_product_attention

    def noted(*arguments, enable_gqa, **options):
        asked.append(enable_gqa)
        return plain(*arguments, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    for repeats in (False, True):
        monkeypatch.setattr("hvdlm.model.attention.repeats_key_value_heads", lambda *_, repeats=repeats: repeats)
        attended = causal_attention(*tensors, mask=mask, dropout=0.0)
        outcomes.append([attended, *torch.autograd.grad(attended.square().sum(), tensors)])
    assert asked == [True, False]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*outcomes, strict=True))


def test_a_gpu_without_flash_attention_is_given_copies(monkeypatch):
    """Before Ampere, and for heads of more than 256 numbers."""
    properties = SimpleNamespace(major=8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    queries = SimpleNamespace(is_cuda=True, device="cuda:0", shape=(1, 4, 16, 64))
    assert _has_flash_attention(queries)
    queries.shape = (1, 4, 16, 320)
    assert not _has_flash_attention(queries)
    properties.major, queries.shape = 7, (1, 4, 16, 64)
    assert not _has_flash_attention(queries)
