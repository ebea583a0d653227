"""Updates on a CPU, by loops compiled by Numba that round every operation by itself.

PyTorch's loops exist for several instruction sets, of which some multiply and add in one rounding: so an update of
theirs has other bits on another kind of CPU, and replicas would drift apart. LLVM is not allowed to join operations
here: these have the same bits on every CPU, whatever the length of its vectors. They read and write memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.gradients.codecs.codec import uses_loops
from hvdlm.gradients.codecs.compiled import compiled

_LEAST_OF_A_THREAD = 64 * 1024  # numbers: a loop over fewer ends before another thread has begun


def are_used(optimizer: torch.optim.Optimizer) -> bool:
    """Whether these loops step the parameters of an optimizer; a fused kernel does on a GPU, and where it is to read
    whether a step is left out (`leave_out_if`)."""
    first = next((each for group in optimizer.param_groups for each in group["params"]), None)
    return first is not None and uses_loops(first) and not hasattr(optimizer, "found_inf")


def step_each(
    optimizer: torch.optim.Optimizer, update: Callable[[Tensor, dict[str, Any], dict[str, Any]], None]
) -> None:
    """Calls `update` with each parameter of an optimizer, its state, and the settings of its group."""
    for group in optimizer.param_groups:
        for each in group["params"]:
            update(each, optimizer.state[each], group)


def add_scaled_(target: Tensor, values: Tensor, factor: float) -> None:
    """target += factor x values."""
    if uses_loops(target):
        _run(_add_scaled, [target, values.float().contiguous()], factor)
    else:
        target.add_(values, alpha=factor)


def move_(target: Tensor, values: Tensor, share: float) -> None:
    """target += share x (values - target); from the side of `values`, as PyTorch does, where that is nearer."""
    if uses_loops(target):
        tensors = [target, values.float().contiguous()]
        _run(*((_move, tensors, share) if share < 0.5 else (_move_nearly, tensors, 1 - share)))
    else:
        target.lerp_(values, share)


def adam_(
    parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], decoupled: bool, freeze_after: int = 0
) -> None:
    """A step of Adam, or AdamW where the decay is `decoupled`, of a parameter on the CPU and its moments in `state`.

    `group`: of an optimizer's settings. `freeze_after`: steps in which second moments are updated; 0: all.
    """
    if parameter.grad is None:
        return
    if not state:  # it is made in the first step, as PyTorch does
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    state["step"] += 1
    step, (beta1, beta2), rate, decay = int(state["step"]), group["betas"], group["lr"], group["weight_decay"]
    is_frozen = 0 < freeze_after < step
    _run(
        _adam,
        [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]],
        *((1 - rate * decay, 0.0) if decoupled else (1.0, decay)),
        *(1 - beta1, beta2, 0.0 if is_frozen else 1 - beta2),
        *(rate / (1 - beta1**step), (1 - beta2 ** (freeze_after if is_frozen else step)) ** 0.5, group["eps"]),
    )


def sgd_(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """A step of SGD of a parameter on the CPU, with the momentum in `state`, if there is one."""
    if parameter.grad is not None:
        if group["momentum"] and not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state.get("momentum_buffer", parameter.new_empty(0))
        scalars = [group["lr"], group["weight_decay"], group["momentum"], group["momentum"] * group["nesterov"]]
        _run(_sgd, [parameter, parameter.grad, momentum], *scalars)


def lion_(parameter: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
    """A step of Lion of a parameter on the CPU."""
    if parameter.grad is not None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        scalars = [1 - rate * group["weight_decay"], rate, 1 - beta1, 1 - beta2]
        _run(_lion, [parameter, parameter.grad, momentum], *scalars)


def _run(loop: Any, tensors: Sequence[Tensor], *scalars: float) -> None:
    """Calls a loop with contiguous float32 tensors as flat arrays, and with numbers, in as many threads as PyTorch
    would.
    """
    arrays = [as_array(each).reshape(-1) for each in tensors]
    numbers = [np.float32(each) for each in scalars]
    length = len(arrays[0])
    threads = min(torch.get_num_threads(), max(1, length // _LEAST_OF_A_THREAD))
    if threads == 1:
        loop(*arrays, *numbers)
        return
    parts = [slice(length * index // threads, length * (index + 1) // threads) for index in range(threads)]
    list(_threads(threads).map(lambda part: loop(*(each[part] for each in arrays), *numbers), parts))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="hvdlm-update")


@compiled()
def _add_scaled(target: np.ndarray, values: np.ndarray, factor: np.float32) -> None:
    for i in range(len(target)):
        target[i] += values[i] * factor


@compiled()
def _move(target: np.ndarray, values: np.ndarray, share: np.float32) -> None:
    for i in range(len(target)):
        target[i] += (values[i] - target[i]) * share


@compiled()
def _move_nearly(target: np.ndarray, values: np.ndarray, left: np.float32) -> None:
    for i in range(len(target)):
        target[i] = values[i] - (values[i] - target[i]) * left


@compiled(error_model="numpy")  # a division by zero is an infinity: a test for it would keep the loop from vectors
def _adam(
    parameter: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    kept: np.float32,
    l2: np.float32,
    share: np.float32,
    beta2: np.float32,
    square_share: np.float32,
    rate: np.float32,
    root: np.float32,
    eps: np.float32,
) -> None:
    for i in range(len(parameter)):
        whole = gradient[i] + parameter[i] * l2
        first[i] += (whole - first[i]) * share
        if square_share:
            second[i] = second[i] * beta2 + whole * whole * square_share
        parameter[i] = parameter[i] * kept - first[i] * rate / (np.sqrt(second[i]) / root + eps)


@compiled()
def _sgd(
    parameter: np.ndarray,
    gradient: np.ndarray,
    momentum: np.ndarray,
    rate: np.float32,
    l2: np.float32,
    kept: np.float32,
    ahead: np.float32,
) -> None:
    for i in range(len(parameter)):
        step = gradient[i] + parameter[i] * l2
        if len(momentum):
            momentum[i] = momentum[i] * kept + step
            step = step + momentum[i] * ahead if ahead else momentum[i]
        parameter[i] -= step * rate


@compiled()
def _lion(
    parameter: np.ndarray,
    gradient: np.ndarray,
    momentum: np.ndarray,
    kept: np.float32,
    rate: np.float32,
    share: np.float32,
    momentum_share: np.float32,
) -> None:
    for i in range(len(parameter)):
        ahead = momentum[i] + (gradient[i] - momentum[i]) * share
        sign = np.float32(np.int32(ahead > 0) - np.int32(ahead < 0))
        parameter[i] = parameter[i] * kept - sign * rate
        momentum[i] += (gradient[i] - momentum[i]) * momentum_share
