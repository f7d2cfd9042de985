"""Attention behind a prefix where the prefix alone needs a gradient, as in a model's first layer, on the CPU.

Autograd would run the kernel's backward pass over all keys, to drop what it finds for the tokens'.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .modes import by_hand
from .workspace import flat_workspace


def ends_at_prefix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *prefix: torch.Tensor) -> bool:
    """Whether :func:`prefixed_attention` may be used, and pays: gradients end here.

    Args:
        query: (batch, heads, queries, size).
        key: (batch, key heads, keys, size).
        value: The same shape.
        *prefix: Keys and values in front.
    """
    operands = (query, key, value, *prefix)
    return (
        by_hand(query, *prefix)
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and all(t.dtype == query.dtype and t.numel() > 0 for t in operands)
        and not any(t.requires_grad for t in operands[:3])
        and key.shape == value.shape
        and query.stride(-1) == 1
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cuda.flash_sdp_enabled()  # on the CPU too
        and (query.shape[1] == key.shape[1] or takes_groups())
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes_groups() -> bool:
    """Whether torch's kernel for the CPU takes fewer key heads than query heads without repeating keys and values."""
    return _found_to_take_groups()


@functools.cache
def _found_to_take_groups() -> bool:
    with torch.enable_grad():
        query, key = (torch.ones(1, heads, 2, 8, device="cpu", requires_grad=True) for heads in (2, 1))
        node: Any = F.scaled_dot_product_attention(query, key, key, enable_gqa=True).grad_fn
    return getattr(node, "_saved_key", query).shape[1] == 1


def prefixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """``softmax(scale · q Kᵀ) V``, as torch's kernel computes it, with gradients for the prefix in front of K and V alone.

    All rows share the prefix, so that its gradients are a few products for each head with the queries of the whole batch.

    Args:
        query: (batch, heads, queries, size).
        key: (batch, key heads, length + keys, size), the prefix in front; key heads divide heads.
        value: The same shape.
        prefix_key: (key heads, length, size).
        prefix_value: The same shape.
        mask: What is added to the scores, (batch or 1, heads or 1, queries, length + keys). It hides none of the prefix.
        scale: Of the scores; one over the root of the size when not given.

    Returns:
        (batch, queries, heads, size), contiguous.

    Raises:
        RuntimeError: A second derivative is asked for, which torch's kernel has not either.

    Saved for backward: the query, the output with its sums of exponentials, and the prefix; no keys and no values.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Prefixed.apply(query, key, value, prefix_key, prefix_value, mask, scale)


class _Prefixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix_key: torch.Tensor,
        prefix_value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        output = output.transpose(1, 2).contiguous()
        ctx.scale, ctx.groups = scale, query.shape[1] // key.shape[1]
        ctx.save_for_backward(query, prefix_key, prefix_value, output, sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, prefix_key, prefix_value, output, sums = ctx.saved_tensors
        grad, queries = grads[0].contiguous(), _by_head(query.transpose(1, 2).contiguous())
        outer, groups = _by_head(grad), ctx.groups
        keys, values = (t.repeat_interleave(groups, 0) if groups > 1 else t for t in (prefix_key, prefix_value))
        heads, count, length = *queries.shape[:2], keys.shape[1]
        sums = sums.transpose(0, 1).reshape(heads, 1, count)
        # Of each query's attention what goes to the prefix, (heads, length, queries): rows of many columns are fast to pass over.
        shares = torch.baddbmm(
            sums, keys, queries.mT, beta=-1, alpha=ctx.scale, out=_new(0, keys, heads, length, count)
        ).exp_()
        inner = torch.mul(grad, output, out=_new(1, keys, *grad.shape)).sum(-1).view(count, heads).t()
        scores = torch.baddbmm(
            inner.unsqueeze(1), values, outer.mT, beta=-1, out=_new(1, keys, heads, length, count)
        ).mul_(shares)
        found = torch.bmm(scores, queries).mul_(ctx.scale), torch.bmm(shares, outer)
        if groups > 1:
            found = tuple(t.unflatten(0, (-1, groups)).sum(1) for t in found)
        return None, None, None, *found, None, None


def _new(slot: int, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory for a result that is dead when the kernel returns."""
    part = flat_workspace(slot, torch.Size(shape).numel(), like.dtype)
    return like.new_empty(shape) if part is None else part.view(shape)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor (batch, queries, heads, size) as (heads, batch · queries, size)."""
    return x.view(-1, *x.shape[2:]).transpose(0, 1)
