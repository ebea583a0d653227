"""Makes the model of a run: initialised, on its device, in its precision, its blocks compiled if configured."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.training.compile_cache import avoid_precompiled_headers, check_compile_cache, try_compiler
from hvdlm.training.precision import DTYPES


def check_compiler(config: Config, device: torch.device) -> None:
    """Raises HvdlmError where blocks are to be compiled and this host lacks what that takes.

    That is a cache in which code can be written and executed, and for the CPU a compiler that works.
    """
    if not config.train.compile:
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


def make_model(config: Config, vocab_size: int, device: torch.device) -> Transformer:
    """The same model on every rank. Blocks are compiled at their first use."""
    model = Transformer(config.model, vocab_size)
    model.initialise(config.train.seed)
    model.to(device)
    model.set_compute_dtype(DTYPES[config.train.precision])
    model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile:
        for block in model.blocks:  # one compiled backward pass of the whole model would make all gradients at its end
            block.compile()
    return model
