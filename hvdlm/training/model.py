"""Makes the model of a run: initialised, on its device, in its precision, its blocks compiled if configured."""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mesh import Mesh
from hvdlm.config import Config, ParallelSection, PrivacySection
from hvdlm.errors import HvdlmError
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.parallel.pipeline.stage_model import StageModel, TensorParallelStageModel
from hvdlm.parallel.pipeline.stages import blocks_by_cost, divide, flops
from hvdlm.parallel.tensor.model import TensorParallelTransformer
from hvdlm.privacy.model import RecordedTransformer
from hvdlm.training.compile_cache import avoid_precompiled_headers, check_compile_cache, try_compiler
from hvdlm.training.compiler_import import leave_compiler_out
from hvdlm.training.precision import DTYPES


def check_compiler(config: Config, device: torch.device) -> None:
    """Raises HvdlmError where blocks are to be compiled and this host lacks what that takes.

    That is a cache in which code can be written and executed, and for the CPU a compiler that works.
    """
    if not config.train.compile:
        leave_compiler_out()
        return
    if device.type != "cpu":
        check_compile_cache()
        return
    compiler = os.environ.get("CXX", "g++")  # as torch.compile looks for it
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [
        what
        for what, is_there in (
            (f"C++ compiler {compiler}", shutil.which(compiler) is not None),
            (f"header {header}", header.exists()),
        )
        if not is_there
    ]
    if missing:
        raise HvdlmError(
            f"train.compile finds no {' and no '.join(missing)}: install them (Debian, Ubuntu: g++ and python3-dev), "
            "name another compiler in CXX, or set train.compile = false"
        )
    try_compiler(compiler, check_compile_cache())
    avoid_precompiled_headers()


def check_deterministic(config: Config, device: torch.device) -> None:
    """Raises HvdlmError where `train.deterministic` is set and PyTorch has no such kernel for a part of this model.

    A step of a small model of the same kind is tried: which kernels there are depends on PyTorch, device and precision.
    """
    if not config.train.deterministic:
        return
    width = 16 * config.model.heads
    small = {"layers": 1, "width": width, "mlp_width": width, "context_length": 32}
    train = config.train.model_copy(update={"compile": False})
    model_section = config.model.model_copy(update=small)
    whole = {"parallel": ParallelSection(), "privacy": PrivacySection()}
    sections = {"model": model_section, "train": train, **whole}
    model = make_model(config.model_copy(update=sections), 64, device)
    tokens = torch.arange(32, device=device)[None]
    documents = document_ids(tokens, 16) if config.model.document_mask else None
    try:
        token_loss(model(tokens, documents), model.output_weight, tokens, model.dtype).backward()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().partition(", but you set")[0].partition("\n")[0]
        raise HvdlmError(
            f"train.deterministic = true, but not on {device.type} with this PyTorch: {reason}; set it to false, or "
            "change the setting of [model] or train.precision that needs this kernel"
        ) from error


def use_deterministic_kernels(wanted: bool) -> None:
    """Makes PyTorch, torch.compile and cuBLAS use only kernels that give the same bits each time, or any. Call it
    before the first matrix product on a GPU: cuBLAS reads its variable then.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we read none
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)


def make_model(config: Config, vocab_size: int, device: torch.device, mesh: Mesh | None = None) -> Transformer:
    """The same model on every rank, or its part of one that ranks of the mesh divide. Blocks are compiled at their
    first use.

    With `parallel.shard` it has shapes alone: strategies/sharded/ gives it parameters.
    """
    use_deterministic_kernels(config.train.deterministic)
    tensor_ranks = mesh["tensor"] if mesh is not None else None  # before all that is made has no memory
    with torch.device("meta") if config.parallel.shard else nullcontext():
        if mesh is not None and mesh.shape["pipeline"] > 1:
            model: Transformer = _stages(config, vocab_size, mesh, tensor_ranks, device)
        elif tensor_ranks is not None and tensor_ranks.size > 1:
            model = TensorParallelTransformer(config.model, vocab_size, tensor_ranks, config.parallel.sequence)
        elif config.privacy.is_used:
            model = RecordedTransformer(config.model, vocab_size)
        else:
            model = Transformer(config.model, vocab_size)
    if not config.parallel.shard:
        model.initialise(config.train.seed)
        model.to(device)
    model.set_compute_dtype(DTYPES[config.train.precision])
    model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile:
        for block in model.blocks:  # one compiled backward pass of the whole model would make all gradients at its end
            block.compile()
    return model


def _stages(
    config: Config, vocab_size: int, mesh: Mesh, tensor_ranks: Communicator | None, device: torch.device
) -> StageModel:
    parallel, rank, ranks = config.parallel, mesh.coordinates["pipeline"], mesh.shape["pipeline"]
    counts = blocks_of_stages(config, vocab_size)
    stages, memory = divide(counts)[rank::ranks], torch.device("meta") if parallel.shard else device
    if parallel.tensor > 1:
        return TensorParallelStageModel(config.model, vocab_size, stages, memory, communicator=tensor_ranks)
    return StageModel(config.model, vocab_size, stages, memory)


def blocks_of_stages(config: Config, vocab_size: int) -> list[int]:
    """How many blocks each stage of a pipeline has: `parallel.split`, or so that all cost about the same."""
    costs = flops(config.model, vocab_size)
    return config.parallel.blocks_of_stages or blocks_by_cost(config.model.layers, config.parallel.stages, costs)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """By seed, step and rank among those that compute with different tokens: resuming needs no random-number state."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)
