"""The reference of one_rank.py: a GPT as nanoGPT ships it, in plain PyTorch, independent of hvdlm's model.

nn modules, scaled_dot_product_attention, GELU by erf, cross-entropy of all logits at once, gradients thrown away and
made anew each step, AdamW as PyTorch chooses it for the device (nanoGPT, model.py and train.py of 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.config import Config, ModelSection
from hvdlm.data.loader import Loader
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate


class PlainGPT(nn.Module):
    """Tokens and targets, (B, T) each, to the mean loss. `approximate`: of GELU, "none" as in nanoGPT, or "tanh"."""

    def __init__(self, config: Config, vocab_size: int, approximate: str = "none") -> None:
        super().__init__()
        shape = config.model
        design = ModelSection(  # GPT-2's, with what may differ taken over
            preset=shape.preset,
            layers=shape.layers,
            heads=shape.heads,
            width=shape.width,
            context_length=shape.context_length,
            vocab_size=shape.vocab_size,
        )
        if shape != design:
            raise HvdlmError("the plain reference is a GPT-2: give a model of that design, or leave out its rows")
        self.tokens = nn.Embedding(vocab_size, shape.width)
        self.positions = nn.Embedding(shape.context_length, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width, shape.heads, approximate) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.output = nn.Linear(shape.width, vocab_size, bias=False)
        self.output.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.norm(x))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)

    def begin_as(self, model: Transformer) -> None:
        """Takes over the weights of hvdlm's model of the same shape."""
        names = {
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
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            weights[name] = weight
        self.load_state_dict({**weights, "output.weight": model.output_weight})


class _Block(nn.Module):
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
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


def plain_step(model: PlainGPT, config: Config, loader: Loader, device: torch.device) -> Callable[[], float]:
    """A function that trains one step and returns its loss, in fp32 or under autocast. The model is on its device."""
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
