"""What takes the steps: hvdlm and plain PyTorch, each with and without differential privacy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from common.torch_adamw import torch_adamw
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config, PrivacySection
from hvdlm.data.loader import Batch
from hvdlm.training.trainer import Trainer
from privacy_cost.untied_gpt import UntiedGPT

Step = Callable[[], None]

HVDLM, TORCH = "hvdlm", "PyTorch"
# Each system, and that without privacy to which it is compared
SYSTEMS = {
    HVDLM: HVDLM,
    "hvdlm, privacy": HVDLM,
    TORCH: TORCH,
    "Opacus, hooks": TORCH,
    "Opacus, ghost clipping": TORCH,
}


def make_step(name: str, config: Config, vocab_size: int) -> Step:
    """One step of a system, on a batch of random tokens, all of as many sequences."""
    tokens = torch.randint(vocab_size, (config.train.global_batch_size, config.model.context_length + 1))
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    if SYSTEMS[name] == HVDLM:
        return _hvdlm(config, vocab_size, inputs, targets, is_private=name != HVDLM)
    model = UntiedGPT(config.model, vocab_size)
    parts = list(zip(*(each.split(config.train.micro_batch_size) for each in (inputs, targets)), strict=True))
    if name == TORCH:
        return _torch(model, config, parts)
    return _opacus(model, config, parts, is_ghost="ghost" in name)


def _hvdlm(config: Config, vocab_size: int, inputs: Tensor, targets: Tensor, is_private: bool) -> Step:
    privacy = config.privacy if is_private else PrivacySection()
    shard = SimpleNamespace(n_tokens=10**9)
    data = SimpleNamespace(eos_id=0, fingerprint="", sources=(), train=SimpleNamespace(shards=[shard]))
    config = config.model_copy(update={"privacy": privacy})
    trainer = Trainer(config, SoloCommunicator(), data, vocab_size, torch.device("cpu"))  # type: ignore[arg-type]
    loader = SimpleNamespace(next=lambda: Batch(trainer.step, inputs, targets))
    return lambda: trainer.train_step(loader, stop_here=False) and None  # type: ignore[arg-type, func-returns-value]


def _torch(model: nn.Module, config: Config, parts: list[tuple[Tensor, Tensor]]) -> Step:
    optimizer, criterion = torch_adamw(model, config.optimizer), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        for inputs, targets in parts:
            (criterion(model(inputs).flatten(0, 1), targets.flatten()) / len(parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()

    return step


def _opacus(model: nn.Module, config: Config, parts: list[tuple[Tensor, Tensor]], is_ghost: bool) -> Step:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore")
    privacy = config.privacy
    arguments = {
        "noise_multiplier": privacy.noise_multiplier,
        "max_grad_norm": privacy.clip_norm,
        "expected_batch_size": config.train.global_batch_size,
        "loss_reduction": "mean",
    }
    criterion = nn.CrossEntropyLoss()
    inner = torch_adamw(model, config.optimizer)
    if is_ghost:
        wrapped: nn.Module = GradSampleModuleFastGradientClipping(model, max_grad_norm=privacy.clip_norm)
        optimizer = DPOptimizerFastGradientClipping(inner, **arguments)
        loss_of = DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")
    else:
        wrapped = GradSampleModule(model)
        optimizer, loss_of = DPOptimizer(inner, **arguments), None

    def step() -> None:
        for number, (inputs, targets) in enumerate(parts, start=1):
            optimizer.signal_skip_step(do_skip=number < len(parts))
            logits = wrapped(inputs)
            if loss_of is not None:
                loss_of(logits.flatten(0, 1), targets.flatten(), shape=logits.shape).backward()
            else:
                criterion(logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step
