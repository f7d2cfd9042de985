"""A linear layer whose frozen weight is changed on the way: the changed weight is built for each product, and never kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from . import recompute
from .modes import by_hand, no_graph
from .recompute import Memo
from .workspace import workspace

Tensors = tuple[torch.Tensor, ...]


class Rule:
    """What a method makes of a weight. Functions of tensors alone, differentiable where grad mode is on."""

    reads_output: ClassVar[bool] = False
    """Whether :meth:`gradients` reads the layer's output."""

    def change(self, weight: torch.Tensor, factors: Tensors, notes: Tensors | None) -> tuple[torch.Tensor, Tensors]:
        """The changed weight, which may lie in the kernels' workspace.

        Args:
            weight: The frozen weight, (rows, columns).
            factors: The method's parameters.
            notes: What an earlier call with the same arguments gave beside the weight.

        Returns:
            The changed weight, and small tensors worth keeping for the backward pass.
        """
        raise NotImplementedError

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, factors: Tensors, notes: Tensors, y: torch.Tensor | None
    ) -> Sequence[torch.Tensor]:
        """Gradients of the factors, through products that are smaller than ``gradᵀ x``.

        Args:
            grad: Gradient of the output, (tokens, rows).
            x: The input, (tokens, columns).
            factors: The method's parameters.
            notes: What :meth:`change` gave.
            y: The output without its bias, where the rule reads it, (tokens, rows).
        """
        raise NotImplementedError


def may_reweight(
    x: torch.Tensor, weight: torch.Tensor, factors: Sequence[torch.Tensor | None], *, few: bool = False
) -> bool:
    """Whether :func:`reweighted_linear` may be used here.

    Not in half precision, where the sum of weight and update would lose small updates, and not where autograd or a compiler
    looks inside: the gradient of a weight built by plain operations is a matrix of the weight's size.

    Args:
        x: The layer's input.
        weight: Its weight.
        factors: The method's parameters.
        few: For inputs of few elements too.
    """
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and all(f is None or f.dtype == x.dtype for f in factors)
        and not weight.requires_grad
        and not torch.is_autocast_enabled(x.device.type)
        and (no_graph(x, *factors, few=few) or by_hand(x, *factors, few=few))
    )


def reweighted_linear(
    rule: Rule,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor],
    memo: Memo | None = None,
) -> torch.Tensor:
    """``x W'ᵀ + bias`` with ``W' = rule(weight, factors)``, where :func:`may_reweight` allows it.

    For many tokens this is the cheapest form of an update: forward it costs one pass over the weight, and nothing of the size of
    ``x`` or ``y`` is touched besides the product itself. The backward pass builds W' again.

    Args:
        rule: How the weight changes.
        x: (…, columns).
        weight: (rows, columns), frozen.
        bias: (rows,), frozen or not.
        factors: The method's parameters.
        memo: Allows to recompute ``x`` in the backward pass, where that is sound (:mod:`peft.kernels.recompute`).

    Returns:
        (…, rows).

    Saved for backward: weight and factors, the rule's notes, and ``x`` unless it can be recomputed; for rules that read it the output.
    """
    if no_graph(x, bias, *factors, few=True):
        return F.linear(x, rule.change(weight, tuple(factors), None)[0], bias)
    return _Reweighted.apply(rule, x, weight, bias, memo, *factors)


class _Reweighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        memo: Memo | None,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        changed, notes = rule.change(weight, factors, None)
        y = F.linear(x, changed, bias)
        needed = any(ctx.needs_input_grad[5:])
        kept = recompute.to_keep(ctx, x, memo, needed)
        kept_output = recompute.output_to_keep(ctx, y, memo, needed and rule.reads_output)
        ctx.rule, ctx.shape, ctx.factors = rule, x.shape, len(factors)
        ctx.save_for_backward(kept, kept_output, weight, bias, *factors, *notes)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        recompute.watch_output(ctx)
        kept, y, weight, bias, *rest = ctx.saved_tensors
        factors, notes = tuple(rest[: ctx.factors]), tuple(rest[ctx.factors :])
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = None
        grad_factors: list[torch.Tensor | None] = [None] * ctx.factors
        needs_x, _, needs_bias, _, *needed = ctx.needs_input_grad[1:]
        if any(needed):
            x = recompute.from_kept(ctx, kept)
            x = x.reshape(-1, x.shape[-1])
            if y is not None:
                if torch.is_grad_enabled():  # create_graph=True: what was kept may be a copy, which has no graph
                    y = F.linear(x, ctx.rule.change(weight, factors, notes)[0])
                elif bias is not None:
                    y = torch.sub(y, bias, out=workspace(1, y))
                y = y.reshape(flat.shape)
            found = ctx.rule.gradients(flat, x, factors, notes, y)
            grad_factors = [g if need else None for g, need in zip(found, needed, strict=True)]
        if needs_x:
            grad_x = (flat @ ctx.rule.change(weight, factors, notes)[0]).view(ctx.shape)
        if needs_bias:
            grad_bias = flat.sum(0)
        return None, grad_x, None, grad_bias, None, *grad_factors
