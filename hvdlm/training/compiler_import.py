"""Training without torch.compile does without its modules, too: 2,000 of them, 1.3 s of a core and 95 MiB a rank.

PyTorch imports them when the first optimizer is made, to tell the compiler which methods not to trace.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

_UNTRACED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def leave_compiler_out() -> None:
    """For a process that compiles nothing: optimizers do not import the compiler.

    `torch._disable_dynamo`, which decorates those methods, finds here what it would have the compiler make. A PyTorch
    that looks elsewhere imports the compiler as before. So does a fused optimizer's step, as on a GPU, a layer that is
    never compiled (of tensor ranks), and an activation checkpoint; for those the compiler's cache must be usable.
    """
    for name in _UNTRACED:
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dynamo_disable = method
    _avoid_unusable_cache()


def _avoid_unusable_cache() -> None:
    """The compiler makes the directory of its cache when it is imported, and fails where that cannot be."""
    try:
        Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
    except OSError:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/"  # it is there, and nothing will be written
