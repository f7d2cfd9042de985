"""A trained linear layer that need not keep its input for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from . import recompute
from .modes import autocast, by_hand, without_autocast
from .recompute import Memo


@dataclass(frozen=True)
class Source:
    """A frozen linear layer whose output is the input of another layer.

    Args:
        x: Its input, (…, columns).
        weight: (rows, columns).
        bias: (rows,), if there is one.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def is_cheap(self) -> bool:
        """Whether making the output again costs little: for a weight that is no wider than high."""
        rows, columns = self.weight.shape
        return (
            columns <= rows
            and not self.weight.requires_grad
            and not (self.bias is not None and self.bias.requires_grad)
        )


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, memo: Memo, source: Source | None = None
) -> torch.Tensor:
    """``x Wᵀ + bias``, as ``F.linear``.

    Args:
        x: (…, in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
        memo: Of the layer, for recomputing ``x``.
        source: The layer that made ``x``, where that is known.

    Returns:
        (…, out_features).

    Saved for backward: ``weight``, and ``x`` unless it can be computed again from what its producer keeps
    (:mod:`peft.kernels.recompute`); ``F.linear`` always saves both. The cost is the producer's own operation once more. A frozen
    linear layer keeps nothing but its weight; where its own input can be computed again, its output is too, from ``source``.
    """
    if not by_hand(x, weight, bias):
        return F.linear(x, weight, bias)
    if source is not None and (source.x.dtype != x.dtype or torch.is_autocast_enabled(x.device.type)):
        source = None
    x, weight, bias = autocast(x, weight, bias)
    with without_autocast(x.device.type):
        if source is None or not source.is_cheap():
            return _Linear.apply(x, weight, bias, memo, None, None, None)
        return _Linear.apply(x, weight, bias, memo, source.x, source.weight, source.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        memo: Memo,
        before: torch.Tensor | None,
        weight_before: torch.Tensor | None,
        bias_before: torch.Tensor | None,
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[1]
        ctx.before = None
        kept = recompute.to_keep(ctx, x, memo, needed)
        if kept is not None and before is not None and weight_before is not None and memo.repeats is not False:
            way = recompute.way_back(before, memo)
            if way is not None and memo.repeats is None:
                memo.repeats = torch.equal(F.linear(before, weight_before, bias_before), x)
            if way is not None and memo.repeats:
                ctx.before, kept = way, None
        ctx.save_for_backward(kept, weight, *((weight_before, bias_before) if ctx.before is not None else (None, None)))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        kept, weight, weight_before, bias_before = ctx.saved_tensors
        if ctx.before is not None:
            before = recompute.recompute(ctx.next_functions[3][0], ctx.before)
            x: Any = F.linear(before, weight_before, bias_before)
        else:
            x = recompute.from_kept(ctx, kept)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None
