"""Adam and SGD of PyTorch, whose updates on a CPU are those of update_loops.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hvdlm.strategies.update_loops import adam_, are_used, sgd_, step_each


class Adam(torch.optim.Adam):
    """Kingma & Ba, ICLR 2015, algorithm 1; the decay is a part of the gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of parameters with a gradient; `closure` is not called on a CPU."""
        if not are_used(self):
            super().step(closure)
            return
        step_each(self, partial(adam_, decoupled=False))


class SGD(torch.optim.SGD):
    """Sutskever et al., ICML 2013, where the rate multiplies the whole momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of parameters with a gradient; `closure` is not called on a CPU."""
        if not are_used(self):
            super().step(closure)
            return
        step_each(self, sgd_)
