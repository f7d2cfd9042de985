"""A linear layer whose input or output is scaled feature by feature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import recompute
from .modes import by_hand, no_graph
from .recompute import Memo
from .workspace import workspace


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    memo: Memo | None,
    *,
    of_input: bool,
) -> torch.Tensor | None:
    """``(l ⊙ x) Wᵀ + bias``, or ``l ⊙ (x Wᵀ + bias)``, where a hand-written form is cheaper than the formula.

    The scale of the output has the gradient ``Σ G ⊙ y`` with y as it was before scaling. What is kept is y as it was after, which
    mostly a later operation keeps in any case: ``Σ G ⊙ y_scaled / l``. That needs l ≠ 0, which is looked up where looking costs
    nothing, on the CPU.

    Args:
        x: (…, columns).
        weight: (rows, columns), frozen.
        bias: (rows,), frozen or not.
        scale: l, (columns,) or (rows,).
        memo: Allows to recompute ``x`` in the backward pass, where that is sound (:mod:`peft.kernels.recompute`).
        of_input: Scale the input.

    Returns:
        (…, rows), or ``None`` where the plain operations are to be used.

    Saved for backward: ``weight``, ``scale``, and ``x`` unless it can be recomputed, or the output.
    """
    device = x.device.type
    if weight.requires_grad or x.dtype != weight.dtype or x.dim() < 2 or torch.is_autocast_enabled(device):
        return None
    if no_graph(x, bias, scale):
        if of_input:
            return F.linear((x * scale).to(x.dtype), weight, bias)
        return F.linear(x, weight, bias).mul_(scale)
    if not by_hand(x, scale):
        return None
    if of_input:
        return _ScaledInput.apply(x, weight, bias, scale, memo)
    if device != "cpu" or not recompute.is_enabled() or not bool(scale.detach().all()):
        return None
    return _ScaledOutput.apply(x, weight, bias, scale, memo)


class _ScaledInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        memo: Memo | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(recompute.to_keep(ctx, x, memo, ctx.needs_input_grad[3]), weight, scale)
        exact = weight.dtype == scale.dtype
        if exact and x.numel() > weight.numel():  # scale what is smaller
            return F.linear(x, torch.mul(weight, scale, out=workspace(0, weight)), bias)
        scaled = torch.mul(x, scale, out=workspace(0, x)) if exact else (x * scale).to(x.dtype)
        return F.linear(scaled, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        kept, weight, scale = ctx.saved_tensors
        x = recompute.from_kept(ctx, kept)
        grad_x = grad_scale = grad_bias = None
        back = grad @ weight
        if ctx.needs_input_grad[3]:
            product = torch.mul(x, back, out=workspace(0, back))
            grad_scale = product.flatten(0, -2).sum(0, dtype=scale.dtype)
        if ctx.needs_input_grad[0]:
            in_place = back.dtype == scale.dtype and not torch.is_grad_enabled()
            grad_x = back.mul_(scale) if in_place else (back * scale).to(back.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, grad_bias, grad_scale, None


class _ScaledOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        memo: Memo | None,
    ) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        y.mul_(scale)
        kept = recompute.output_to_keep(ctx, y, memo, ctx.needs_input_grad[3])
        ctx.save_for_backward(kept, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second derivative was asked for (create_graph=True), but a layer whose output is scaled keeps only what the first one "
                "needs. Run the forward pass inside `with peft.helpers.recompute_inputs(False):`, or set PEFT_RECOMPUTE=0."
            )
        recompute.watch_output(ctx)
        y, weight, scale = ctx.saved_tensors
        grad_x = grad_scale = grad_bias = None
        if ctx.needs_input_grad[3]:
            product = torch.mul(grad, y, out=workspace(0, y)).flatten(0, -2)
            grad_scale = product.sum(0, dtype=scale.dtype) / scale
        if ctx.needs_input_grad[0]:
            exact = weight.dtype == scale.dtype
            if exact and grad.numel() > weight.numel():  # scale what is smaller
                grad_x = grad @ torch.mul(weight, scale[:, None], out=workspace(0, weight))
            else:
                grad_x = (grad * scale).to(grad.dtype) @ weight
        if ctx.needs_input_grad[2]:
            grad_bias = (grad.flatten(0, -2).sum(0) * scale).to(grad.dtype)
        return grad_x, None, grad_bias, grad_scale, None
