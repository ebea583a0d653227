"""The formula for a rank's memory against what autograd saves, and by hand."""

from __future__ import annotations

import pytest
import torch
from shapes import GPT2, LLAMA, preset
from torch import Tensor

from hvdlm.config import ModelSection
from hvdlm.model.linear import Linear
from hvdlm.model.loss import loss_chunk_tokens
from hvdlm.model.memory import sharded_memory, training_memory_bytes
from hvdlm.model.transformer import Transformer, document_ids


def test_memory_of_weights_by_hand():
    memory = training_memory_bytes(preset("gpt2"), 50257, 1, "bf16")
    assert memory.parameters == memory.gradients == 4 * 124_439_808
    assert memory.moments == 8 * 124_439_808
    assert memory.cast_parameters == 2 * 12 * 12 * 768**2
    parts = [memory.parameters, memory.gradients, memory.moments, memory.cast_parameters]
    in_use = sum(parts) + memory.activations + memory.temporary + memory.loss
    assert memory.total == in_use + memory.gaps
    assert memory.gaps == in_use // 4
    assert training_memory_bytes(preset("gpt2"), 50257, 1, "bf16", "cuda").gaps == 0
    assert training_memory_bytes(preset("gpt2"), 50257, 1, "fp32").cast_parameters == 0
    for algorithm in ("dion", "muon"):
        of_matrices = training_memory_bytes(preset("gpt2"), 50257, 1, "bf16", algorithm=algorithm)
        assert of_matrices.moments == 8 * 124_439_808 - 4 * 12 * 12 * 768**2


@pytest.mark.parametrize("length", [128, 512, 1024])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_activations_are_what_autograd_saves(config, precision, length):
    """Every storage that the blocks save for backward, once, without parameters and their copies."""
    config = config.model_copy(update={"layers": 4, "width": 256, "context_length": length})
    measured = saved_by_autograd(config, precision)
    estimate = training_memory_bytes(config, 101, 3, precision).activations
    assert estimate == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_where_key_and_value_heads_are_copied_for_their_query_heads(position, precision, monkeypatch):
    """As on a GPU in fp32 or with a mask of documents; a CPU copies none by itself."""
    config = LLAMA.model_copy(update={"layers": 2, "width": 256, "context_length": 640, "position": position})
    grouped = training_memory_bytes(config, 101, 3, precision).activations
    for module in ("attention", "memory"):
        monkeypatch.setattr(f"hvdlm.model.{module}.repeats_key_value_heads", lambda *_: True)
    measured = saved_by_autograd(config, precision)
    estimate = training_memory_bytes(config, 101, 3, precision).activations
    assert estimate == pytest.approx(measured, rel=0.05)
    # 2 D for the copies; with RoPE, what they were made of goes: keys and values, (2 K) E, turned keys, K E, and the
    # queries before they were turned, H E
    item, tokens = (2 if precision == "bf16" else 4), 3 * 640
    gone = 2 * 128 + 128 + 256 if position == "rope" else 0
    assert estimate - grouped == 2 * item * tokens * (2 * 256 - gone)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_blocks_share_one_mask_of_documents(precision):
    config = GPT2.model_copy(update={"layers": 4, "width": 64, "context_length": 640, "document_mask": True})
    measured = saved_by_autograd(config, precision)
    estimate = training_memory_bytes(config, 101, 3, precision).activations
    assert estimate == pytest.approx(measured, rel=0.05)
    plain = training_memory_bytes(config.model_copy(update={"document_mask": False}), 101, 3, precision).activations
    assert estimate - plain == (2 if precision == "bf16" else 4) * 3 * 640 * 640


def test_llama_1b_in_fp32_holds_copies_of_heads_and_no_probabilities():
    """On a GPU: 8 sequences of 2,048 tokens whose 8 key and value heads become 32."""
    config = preset("llama-1b")
    heads, length, width = config.heads, config.context_length, config.width
    key_value_width = width * config.kv_heads // heads
    on_gpu, on_cpu = (training_memory_bytes(config, 50257, 8, "fp32", device) for device in ("cuda", "cpu"))
    per_token = 4 * (width + 2 * width) - 4 * (width + 2 * key_value_width + width + key_value_width)
    norms = 12 * width  # what a CPU keeps of RMSNorm in addition
    assert on_gpu.activations - on_cpu.activations == config.layers * 8 * length * (per_token - norms)
    assert 4 * 8 * heads * length * length > 4.2e9  # what the probabilities of one layer would have taken


def saved_by_autograd(config: ModelSection, precision: str) -> int:
    """Bytes of the storages that blocks save for the backward pass of 3 sequences, as the test above says."""
    model = Transformer(config, 101)
    model.set_compute_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.low_precision_weight is not None:
            own.add(layer.low_precision_weight.untyped_storage().data_ptr())
    saved: dict[int, Tensor] = {}  # tensors are kept, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(101, (3, config.context_length))
    documents = document_ids(tokens, 0) if config.document_mask else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, documents)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_blocks_that_are_computed_again_keep_their_input_and_one_of_them_the_rest():
    config = preset("gpt2")
    whole = training_memory_bytes(config, 50257, 4, "bf16", "cuda")
    less = training_memory_bytes(config, 50257, 4, "bf16", "cuda", activation_checkpointing=True)
    assert less.activations == 4 * 1024 * 12 * 4 * 768 + whole.activations // 12
    assert whole.total - less.total == whole.activations - less.activations


def test_a_gpu_holds_a_whole_chunk_of_logits_in_fp32_as_well():
    config = preset("gpt2")
    on_cpu, on_gpu = (training_memory_bytes(config, 50257, 16, "bf16", device) for device in ("cpu", "cuda"))
    # 512 MiB of logits in 16 bits, at most 4,096 tokens of them, and as many in fp32; 128 MiB without on a CPU
    assert on_gpu.loss - on_cpu.loss == (2 * 4096 + 4 * 4096 - 2 * 1335) * 50257


def test_chunk_of_logits():
    assert loss_chunk_tokens(50_257, 4) == 667  # 667 x 50,257 x 4 bytes are just below 128 MiB
    assert loss_chunk_tokens(50_257, 2) == 1335
    assert loss_chunk_tokens(280_000, 4) == 256
    assert loss_chunk_tokens(256, 4) == 4096
    assert loss_chunk_tokens(50_257, 4, "cuda") == 2670  # of 512 MiB


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_shards_by_hand(precision: str) -> None:
    """GPT-2 on 4 ranks, in numbers of 4 bytes: 12 blocks of 12 x 768^2 in matrices, the embedding larger than one."""
    whole = training_memory_bytes(preset("gpt2"), 50257, 1, precision)
    numbers, block, embedding = 124_439_808, 12 * 768**2, 50257 * 768
    copies = 12 * block // 2 if precision == "bf16" else 0
    masters = numbers - 12 * block * 3 // 4 if precision == "bf16" else numbers
    expected = {
        1: (masters, numbers, copies),
        2: (masters, numbers // 4 + 3 * 1000, copies),
        3: (numbers // 4, numbers // 4 + 3 * embedding, 2 * embedding),
    }
    for stage, (parameters, gradients, cast) in expected.items():
        found = sharded_memory(whole, preset("gpt2"), 50257, stage, 4, 4000)
        assert found.parameters == 4 * parameters, stage
        assert found.gradients == 4 * min(gradients, numbers), stage
        assert found.cast_parameters == 4 * cast, stage
        assert found.moments == 8 * numbers // 4
        assert found.gaps == pytest.approx((found.total - found.gaps) / 4, abs=2)
        assert (found.activations, found.loss) == (whole.activations, whole.loss)
