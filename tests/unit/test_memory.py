"""The formula for a rank's memory against what autograd saves, and by hand."""

from __future__ import annotations

import pytest
import torch
from shapes import GPT2, LLAMA, preset
from torch import Tensor

from hvdlm.model.linear import Linear
from hvdlm.model.loss import loss_chunk_tokens
from hvdlm.model.memory import training_memory_bytes
from hvdlm.model.transformer import Transformer


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


@pytest.mark.parametrize("length", [128, 512, 1024])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_activations_are_what_autograd_saves(config, precision, length):
    """Every storage that the blocks save for backward, once, without parameters and their copies."""
    config = config.model_copy(update={"layers": 4, "width": 256, "context_length": length})
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
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    estimate = training_memory_bytes(config, 101, 3, precision).activations
    assert estimate == pytest.approx(measured, rel=0.1)


def test_blocks_that_are_computed_again_keep_their_input_and_one_of_them_the_rest():
    config = preset("gpt2")
    whole = training_memory_bytes(config, 50257, 4, "bf16", "cuda")
    less = training_memory_bytes(config, 50257, 4, "bf16", "cuda", activation_checkpointing=True)
    assert less.activations == 4 * 1024 * 12 * 4 * 768 + whole.activations // 12
    assert whole.total - less.total == whole.activations - less.activations


def test_a_gpu_holds_a_whole_chunk_of_logits_in_fp32_as_well():
    config = preset("gpt2")
    on_cpu, on_gpu = (training_memory_bytes(config, 50257, 16, "bf16", device) for device in ("cpu", "cuda"))
    assert on_gpu.loss - on_cpu.loss == 4 * 1335 * 50257


def test_chunk_of_logits():
    assert loss_chunk_tokens(50_257, 4) == 667  # 667 x 50,257 x 4 bytes are just below 128 MiB
    assert loss_chunk_tokens(50_257, 2) == 1335
    assert loss_chunk_tokens(280_000, 4) == 256
    assert loss_chunk_tokens(256, 4) == 4096
