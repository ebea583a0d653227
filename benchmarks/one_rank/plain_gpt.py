"""The reference: a GPT as nanoGPT has it, in plain PyTorch and independent of hvdlm's model.

It uses torch.nn modules, scaled_dot_product_attention, GELU by erf, cross-entropy of all logits at once, gradients
that are freed after each step, and PyTorch's default AdamW for the device (nanoGPT, model.py and train.py of 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.config import Config, ModelSection
from hvdlm.data.loader import IGNORE, Loader
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate


class PlainGPT(nn.Module):
    """Maps inputs and targets, (B, T) int64 each, to the mean loss. `approximate`: of GELU, "none" or "tanh"."""

    def __init__(self, config: Config, vocab_size: int, approximate: str = "none") -> None:
        """Raises HvdlmError if the model has another design than GPT-2."""
        super().__init__()
        model = config.model
        gpt2 = ModelSection(  # all other settings have GPT-2's values
            preset=model.preset,
            layers=model.layers,
            heads=model.heads,
            width=model.width,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
        )
        if model != gpt2:
            raise HvdlmError("the plain reference is a GPT-2: give a model of that design, or leave out its rows")
        self.tokens = nn.Embedding(vocab_size, model.width)
        self.positions = nn.Embedding(model.context_length, model.width)
        self.blocks = nn.ModuleList(PlainBlock(model.width, model.heads, approximate) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.width)
        self.output = nn.Linear(model.width, vocab_size, bias=False)
        self.output.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.norm(x))  # (B, T, V)
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORE)

    def copy_weights(self, model: Transformer) -> None:
        """Replaces the weights by those of an hvdlm model of the same shape."""
        new_names = {
            "token_embedding.": "tokens.",
            "position_embedding.": "positions.",
            "final_norm.": "norm.",
            "attention.qkv.": "qkv.",
            "attention.output.": "attended.",
            "mlp.up.": "mlp.0.",
            "mlp.down.": "mlp.2.",
        }
        weights = {}
        for name, weight in model.state_dict().items():
            for old, new in new_names.items():
                name = name.replace(old, new)
            weights[name] = weight
        self.load_state_dict({**weights, "output.weight": model.output_weight})


class PlainBlock(nn.Module):
    """(B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int, approximate: str) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        gelu = nn.GELU(approximate)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


def plain_step(model: PlainGPT, config: Config, loader: Loader, device: torch.device) -> Callable[[], float]:
    """A function that trains one step, in fp32 or under autocast, and returns its loss. `model` is on `device`."""
    settings, dtype = config.optimizer, DTYPES[config.train.precision]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=device.type == "cuda",
    )

    def step() -> float:
        batch = loader.next()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(batch.index, config.train.steps, settings)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(batch.inputs.to(device), batch.targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
