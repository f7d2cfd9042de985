"""A trained linear layer that need not keep its input for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import recompute
from .modes import autocast, by_hand, without_autocast
from .recompute import Memo


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, memo: Memo) -> torch.Tensor:
    """``x Wᵀ + bias``, as ``F.linear``.

    Args:
        x: (…, in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
        memo: Of the layer, for recomputing ``x``.

    Returns:
        (…, out_features).

    Saved for backward: ``weight``, and ``x`` unless it can be computed again from what its producer keeps
    (:mod:`peft.kernels.recompute`); ``F.linear`` always saves both. The cost is the producer's own operation once more.
    """
    if not by_hand(x, weight, bias):
        return F.linear(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    with without_autocast(x.device.type):
        return _Linear.apply(x, weight, bias, memo)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, memo: Memo) -> torch.Tensor:
        ctx.save_for_backward(recompute.to_keep(ctx, x, memo, ctx.needs_input_grad[1]), weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        kept, weight = ctx.saved_tensors
        x = recompute.from_kept(ctx, kept)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None
