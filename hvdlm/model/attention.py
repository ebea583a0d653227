"""Causal attention, by what is fastest where it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Attention in 16 bits on a CPU uses plain matrix products up to this sequence length: beyond, the probabilities that
# its backward pass needs take more memory than all else that a block keeps.
LONGEST_PLAIN_ATTENTION = 512

# Queries of a block there. Keys after a block's last query are skipped, about half of all; smaller blocks would skip
# more but make slower products.
ATTENTION_BLOCK = 256


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V, where no query looks at later keys.

    queries: (B, H, T, E). keys, values: (B, K, S, E), H a multiple of K. mask: (B or 1, 1, T, S), bool, True where a
    query may look, or added to its scores, in their dtype; None for all that is not later. Returns (B, H, T, E).

    PyTorch's scaled_dot_product_attention, but for short sequences in 16 bits on a CPU: its kernel there takes so few
    rows at once that forward and backward took up to 2.8 times as long as the plain products here (benchmarks/LOG.md).
    """
    heads, length = queries.shape[1:3]
    is_short = mask is None and 1 < length <= LONGEST_PLAIN_ATTENTION and keys.shape[2] == length
    is_low = queries.dtype in (torch.bfloat16, torch.float16)
    if queries.device.type == "cpu" and is_low and is_short and not dropout:
        if keys.shape[1] != heads:
            keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        attended: Tensor = _CausalAttention.apply(queries, keys, values)  # type: ignore[no-untyped-call]
        return attended
    is_grouped = keys.shape[1] != heads
    if is_grouped and (
        repeats_key_value_heads(queries.device.type, is_low, mask is not None) or not _has_flash_attention(queries)
    ):
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        is_grouped = False
    return functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and length > 1,
        enable_gqa=is_grouped,
    )


def repeats_key_value_heads(device: str, is_low: bool, has_mask: bool) -> bool:
    """Whether each key and value head is copied for the query heads that it serves, on a "cpu" or "cuda" device.

    On GPUs only PyTorch's flash attention takes several query heads to one of keys, in 16 bits and without a mask.
    What remains otherwise makes all probabilities, (B, H, T, S) in fp32: 4.3 GB a layer for 8 sequences of llama-1b.
    With copies its memory-efficient attention does it.
    """
    return device == "cuda" and (not is_low or has_mask)


def _has_flash_attention(queries: Tensor) -> bool:
    """Where it takes grouped heads: GPUs from Ampere on, and heads of at most 256 numbers; always on a CPU."""
    if not queries.is_cuda:
        return True
    return torch.cuda.get_device_properties(queries.device).major >= 8 and queries.shape[-1] <= 256


def attention_blocks(length: int) -> list[tuple[int, int]]:
    """First query, and the one after the last, of each block that plain attention takes at once."""
    return [(start, min(start + ATTENTION_BLOCK, length)) for start in range(0, length, ATTENTION_BLOCK)]


class _CausalAttention(torch.autograd.Function):
    """Blocks of queries one after the other; softmax and its gradient in fp32.

    All products, scores among them, and sums over blocks are rounded to the dtype of the arguments.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shape = queries.shape
        queries = queries * shape[-1] ** -0.5  # before the products, for fp16's range
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (queries, keys, values))  # (B H, T, E)
        attended, probabilities = [], []
        for start, end in attention_blocks(shape[2]):
            scores = (q[:, start:end] @ k[:, :end].mT).float()  # (B H, n, end)
            # Added, where a choice would do, because torch.compile makes vector instructions of that
            future = torch.full((end - start, end), -torch.inf, device=q.device).triu_(start + 1)
            p = torch.softmax(scores.add_(future), dim=-1).to(q.dtype)
            probabilities.append(p)
            attended.append(p @ v[:, :end])
        output = torch.cat(attended, dim=1)
        ctx.save_for_backward(q, k, v, output, *probabilities)
        return output.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, output, *probabilities = ctx.saved_tensors
        shape, scale = grad.shape, grad.shape[-1] ** -0.5
        grad = grad.reshape(output.shape)
        # With p = softmax(s), ds = p (dp - sum p dp), and sum p dp = sum o do (Dao et al. 2022, arXiv:2205.14135,
        # appendix B.2)
        common = (grad.float() * output.float()).sum(dim=-1, keepdim=True)  # (B H, T, 1)
        q_grads = []
        k_grad, v_grad = torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), p in zip(attention_blocks(shape[2]), probabilities, strict=True):
            block = grad[:, start:end]
            p_grad = (block @ v[:, :end].mT).float()
            s_grad = p_grad.sub_(common[:, start:end]).mul_(p.float()).to(q.dtype)
            q_grads.append(s_grad @ k[:, :end])
            k_grad[:, :end] += s_grad.mT @ q[:, start:end]
            v_grad[:, :end] += p.mT @ block
        q_grad = torch.cat(q_grads, dim=1).mul_(scale)
        return q_grad.view(shape), k_grad.view(shape), v_grad.view(shape)
