"""One process and its GPU: codecs on the communication stream, attention, the loss, devices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.comm.gpus import visible_gpus
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import CommSection, CompressionSection, ModelSection
from hvdlm.config_reader import load
from hvdlm.gradients.sync import GradientSync
from hvdlm.model.attention import causal_attention
from hvdlm.model.loss import token_loss
from hvdlm.model.memory import training_memory_bytes
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.training.hardware import choose_device, gpu_uuid
from hvdlm.training.model import check_deterministic, make_model
from hvdlm.training.peak import peak_flops

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(120)]

CPU = torch.device("cpu")
CODECS = ["none", "fp16", "bf16", "int8", "int4", "int2", "topk", "topk2", "powersgd"]
MIB = 2**20


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return choose_device("cuda", SoloCommunicator())


def test_gpus_have_names_of_their_own(gpu: torch.device, measured: Callable[[str], None]) -> None:
    uuids = visible_gpus()
    assert len(set(uuids)) == torch.cuda.device_count() >= 1
    assert gpu_uuid(gpu) == uuids[gpu.index]
    peak = peak_flops(gpu, "bf16")
    known = f"{peak / 1e12:.0f} TFLOP/s in bf16" if peak else "peak not known"
    measured(f"{len(uuids)} x {torch.cuda.get_device_name(gpu)}, {known}")


def gradients_of(device: torch.device, codec: str, steps: int, bad: bool) -> list[Tensor]:
    """What a codec delivers in each step, and what it keeps, by the communication stream; on the CPU in the end."""
    model = nn.Sequential(nn.Linear(300, 257), nn.LayerNorm(257), nn.Linear(257, 300, bias=False)).to(device)
    comm = CommSection(bucket_mb=0.3)
    sync = GradientSync(model, SoloCommunicator(), comm, CompressionSection(codec=codec, density=0.05))
    sync._bypasses_channels = False  # codec none too goes by the stream
    generator = torch.Generator().manual_seed(1)
    outcome = []
    for step in range(steps):
        sync.zero_grad()
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if bad and step == 1:
                drawn.view(-1)[5] = math.inf
            parameter.grad = drawn.to(device)
        sync.wait()
        outcome += [bucket.buffer.to("cpu", copy=True) for bucket in sync.buckets]
        outcome += [tensor.to("cpu", copy=True) for tensor in sync.codec_state().values()]
    sync.close()
    return outcome


@pytest.mark.parametrize("codec", CODECS)
def test_codec_on_the_communication_stream(codec: str, gpu: torch.device) -> None:
    """Bit for bit what the loops for CPUs do; powersgd, whose sums have another order, nearly."""
    tolerance = 1e-3 if codec == "powersgd" else 0.0
    for on_gpu, on_cpu in zip(gradients_of(gpu, codec, 4, False), gradients_of(CPU, codec, 4, False), strict=True):
        assert torch.allclose(on_gpu, on_cpu, rtol=tolerance, atol=tolerance), (on_gpu - on_cpu).abs().max()


@pytest.mark.parametrize("codec", ["int4", "int2", "topk", "topk2", "powersgd"])
def test_what_is_not_finite_leaves_no_residual(codec: str, gpu: torch.device) -> None:
    tolerance = 1e-3 if codec == "powersgd" else 0.0
    for on_gpu, on_cpu in zip(gradients_of(gpu, codec, 3, True), gradients_of(CPU, codec, 3, True), strict=True):
        assert torch.allclose(on_gpu, on_cpu, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("codec", CODECS)
def test_codec_does_not_wait_for_the_gpu(codec: str, gpu: torch.device) -> None:
    """PyTorch raises an error at whatever makes the host wait."""
    bucket_model = nn.Linear(512, 512, device=gpu)
    sync = GradientSync(bucket_model, SoloCommunicator(), CommSection(), CompressionSection(codec=codec))
    (bucket,), (own,), channel = sync.buckets, sync.codecs, sync.channels[0]
    bucket.buffer.normal_()
    own.reduce_(bucket.buffer, channel.exchange, 0)  # loads what the first call loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        own.reduce_(bucket.buffer, channel.exchange, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sync.close()


def peak_of(action: Callable[[], object]) -> int:
    """Bytes that PyTorch allocates in addition, at their most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_make_no_matrix_of_probabilities(
    dtype: torch.dtype, has_mask: bool, gpu: torch.device, measured: Callable[[str], None]
) -> None:
    """Forward and backward, against plain products in fp32 for a part of the batch."""
    batch, heads, groups, length, width = 2, 16, 4, 2048, 64
    generator = torch.Generator(gpu).manual_seed(2)
    shapes = [(batch, count, length, width) for count in (heads, groups, groups)]
    tensors = [torch.randn(shape, generator=generator, device=gpu).to(dtype).requires_grad_() for shape in shapes]
    future = torch.full((length, length), -torch.inf, device=gpu).triu_(1)
    mask = future.to(dtype)[None, None].expand(batch, 1, -1, -1).contiguous() if has_mask else None
    outcome: list[Tensor] = []

    def attend() -> None:
        attended = causal_attention(*tensors, mask=mask, dropout=0.0)
        outcome.append(attended.detach())
        attended.float().square().sum().backward()

    attend()  # loads kernels
    peak = peak_of(attend)
    probabilities = 4 * batch * heads * length * length
    measured(f"{peak / MIB:.0f} MiB, probabilities would take {probabilities / MIB:.0f}")
    assert peak < probabilities / 2
    q, k, v = (tensor.detach().float()[:1] for tensor in tensors)
    k, v = (each.repeat_interleave(heads // groups, dim=1) for each in (k, v))
    expected = torch.softmax(q @ k.mT * width**-0.5 + future, dim=-1) @ v
    assert (outcome[-1][:1].float() - expected).norm() / expected.norm() < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("document_mask", [False, True])
def test_memory_is_what_the_dry_run_says(
    precision: str, document_mask: bool, gpu: torch.device, measured: Callable[[str], None]
) -> None:
    """Of a Llama of 4 blocks with grouped heads, but for the optimizer, which is not run here."""
    words = {"preset": "llama-1b", "layers": 4, "width": 1024, "heads": 16, "kv_heads": 4, "context_length": 1024}
    words["document_mask"] = str(document_mask).lower()
    arguments = [word for name, value in words.items() for word in (f"--model.{name}", str(value))]
    config = load(None, [*arguments, "--train.precision", precision, "--model.mlp_width", "2816"], PRESETS)
    vocabulary, sequences = 32_000, 4

    def step() -> None:
        model = make_model(config, vocabulary, gpu)
        tokens = torch.randint(vocabulary, (sequences, 1024), device=gpu)
        documents = document_ids(tokens, 7) if document_mask else None
        token_loss(model(tokens, documents), model.output_weight, tokens, model.dtype).backward()

    step()
    peak = peak_of(step)
    estimate = training_memory_bytes(config.model, vocabulary, sequences, config.train.precision, "cuda")
    predicted = estimate.total - estimate.moments
    measured(f"{peak / MIB:.0f} MiB, predicted {predicted / MIB:.0f}")
    assert 0.75 < peak / predicted < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_against_cross_entropy(dtype: torch.dtype, gpu: torch.device) -> None:
    generator = torch.Generator(gpu).manual_seed(5)
    hidden = torch.randn(6000, 128, generator=generator, device=gpu, requires_grad=True)
    weight = (torch.randn(30_000, 128, generator=generator, device=gpu) * 0.1).requires_grad_()
    targets = torch.randint(30_000, (6000,), generator=generator, device=gpu)
    ours = token_loss(hidden, weight, targets, dtype) / 6000
    own = torch.autograd.grad(ours, (hidden, weight))
    exact = functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    expected = torch.autograd.grad(exact, (hidden, weight))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert float((ours - exact).detach().abs()) < tolerance
    for mine, theirs in zip(own, expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize("preset", ["tiny", "llama-1b"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_gradients_are_those_of_the_cpu(
    preset: str, precision: str, tolerance: float, gpu: torch.device, measured: Callable[[str], None]
) -> None:
    """Of all parameters at once, against fp32 on the CPU: products in TF32 would differ by 3e-4 and more."""
    small = {"preset": preset, "layers": 2, "width": 256, "heads": 8, "kv_heads": 2, "context_length": 256}
    small |= {"mlp_width": 512}
    words = [word for name, value in small.items() for word in (f"--model.{name}", str(value))]
    config = load(None, [*words, "--train.precision", precision], PRESETS)
    exact = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    tokens = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(0))
    scale = 1024.0 if precision == "fp16" else 1.0
    gradients = []
    for each, device in ((exact, CPU), (config, gpu)):
        model = make_model(each, 1000, device)
        loss = token_loss(
            model(tokens.to(device)), model.output_weight, tokens.to(device), model.dtype, grad_scale=scale
        )
        (loss / tokens.numel() * scale).backward()
        gradients.append(torch.cat([parameter.grad.flatten().cpu() / scale for parameter in model.parameters()]))
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    measured(f"differ by {error:.1e}")
    assert error < tolerance


@pytest.mark.parametrize("preset", ["tiny", "llama-1b"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("document_mask", ["false", "true"])
def test_deterministic_kernels_give_the_same_bits(
    preset: str, precision: str, document_mask: str, gpu: torch.device
) -> None:
    """Where one is missing, check_deterministic says so, and this fails by its sentence."""
    small = {"preset": preset, "layers": 2, "width": 512, "heads": 8, "kv_heads": 2, "context_length": 512}
    small |= {"document_mask": document_mask, "mlp_width": 1024}
    words = [word for name, value in small.items() for word in (f"--model.{name}", str(value))]
    config = load(None, [*words, "--train.precision", precision, "--train.deterministic", "true"], PRESETS)
    try:
        check_deterministic(config, gpu)
        gradients = []
        for _ in range(2):
            model = make_model(config, 1000, gpu)
            tokens = torch.randint(1000, (8, 512), generator=torch.Generator().manual_seed(0)).to(gpu)
            documents = document_ids(tokens, 7) if document_mask == "true" else None
            token_loss(model(tokens, documents), model.output_weight, tokens, model.dtype).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_blocks_with_grouped_heads(gpu: torch.device) -> None:
    """The choice between grouped and copied heads is one that torch.compile can trace."""
    shape = {"layers": 1, "heads": 8, "kv_heads": 2, "width": 256, "context_length": 256, "position": "rope"}
    config = ModelSection(**shape)  # type: ignore[arg-type]
    outcomes = []
    for is_compiled in (False, True):
        model = Transformer(config, 100)
        model.initialise(0)
        model.to(gpu).set_compute_dtype(torch.bfloat16)
        if is_compiled:
            for block in model.blocks:
                block.compile(fullgraph=True)
        tokens = torch.arange(256, device=gpu)[None] % 100
        token_loss(model(tokens), model.output_weight, tokens, model.dtype).backward()
        outcomes.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (outcomes[0] - outcomes[1]).norm() / outcomes[0].norm() < 2e-2
