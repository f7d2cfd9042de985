"""A low-rank update of a weight's rows together with their lengths."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from . import recompute
from .low_rank import dropped, input_gradient, keep_mask, low_rank_gradients, narrow, note_dropout
from .modes import by_hand
from .recompute import Memo
from .reweighted import Rule, Tensors
from .workspace import widened, workspace


class Magnitude(Rule):
    """``W' = c ⊙ V`` with ``V = W + scale · b a`` and ``c = m / ‖V‖``, a value for each row.

    ``‖V‖`` counts as a constant in the backward pass (Liu et al. 2024, arXiv 2402.09353, eq. 11). With G the gradient of the output
    y = x W'ᵀ the factors' gradients are those of a low-rank product whose b is scaled by c, and that of m is
    ``Σ G ⊙ (x Vᵀ) / ‖V‖ = Σ G ⊙ y / m``: no product beside those of the low-rank update. m must not be zero.

    Factors: a, (r, columns), b, (rows, r), and m, (rows,). Notes: ‖V‖, (rows,).

    Args:
        scale: Factor of the product.
    """

    reads_output: ClassVar[bool] = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def change(self, weight: torch.Tensor, factors: Tensors, notes: Tensors | None) -> tuple[torch.Tensor, Tensors]:
        a, b, m = factors
        v = torch.addmm(weight, b, a, alpha=self.scale, out=workspace(0, weight))
        norms = notes[0] if notes else _row_norms(v)
        c = (m / norms)[:, None]
        return (v * c if torch.is_grad_enabled() else v.mul_(c)), (norms,)

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, factors: Tensors, notes: Tensors, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        a, b, m = factors
        assert y is not None
        c = (m / notes[0])[:, None]
        grad_a, grad_b = low_rank_gradients(grad, x, a, b * c, self.scale)
        grad_m = torch.mul(grad, y, out=workspace(2, y)).sum(0) / m
        return grad_a, grad_b * c, grad_m


def magnitude_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    scale: float,
    rate: float = 0.0,
    memo: Memo | None = None,
) -> torch.Tensor | None:
    """``c ⊙ (x Wᵀ + scale · (drop(x) aᵀ) bᵀ) + bias`` with ``c = m / ‖W + scale · b a‖``, without building the changed weight.

    This is the form of :class:`Magnitude` for where that weight cannot be used: with dropout, which acts on the update alone, and in half
    precision, where it would lose small updates. Update, scaling and sum are then computed in the factors' dtype and rounded once.

    Args:
        x: (…, columns).
        weight: (rows, columns), frozen.
        bias: (rows,), frozen or not.
        a: (r, columns), in the weight's dtype or a wider one.
        b: (rows, r), likewise.
        m: (rows,), without a zero.
        scale: Factor of the product.
        rate: Probability of dropping an element of ``x`` on the way to ``a``.
        memo: Allows to recompute ``x`` in the backward pass, where that is sound (:mod:`peft.kernels.recompute`).

    Returns:
        (…, rows), or ``None`` where the plain operations are to be used: without a graph, with autocast, or for few tokens.

    Saved for backward: weight and factors, norms, ``drop(x) aᵀ``, the output, and ``x`` unless it can be recomputed. ‖·‖ counts as a
    constant there.
    """
    if weight.requires_grad or torch.is_autocast_enabled(x.device.type) or not by_hand(x, a, b, m):
        return None
    return _MagnitudeLinear.apply(x, weight, bias, a, b, m, scale, rate, memo)


class _MagnitudeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        m: torch.Tensor,
        scale: float,
        rate: float,
        memo: Memo | None,
    ) -> torch.Tensor:
        note_dropout(ctx, x, scale, rate)
        changed = torch.addmm(widened(weight, a.dtype), b, a, alpha=scale, out=workspace(2, weight, a.dtype))
        norms = _row_norms(changed)
        c = m / norms
        t = narrow(a, dropped(widened(x, a.dtype), keep_mask(ctx, a.dtype)))
        y = F.linear(x, weight, bias)
        wide = widened(y, a.dtype)
        wide.view(-1, y.shape[-1]).addmm_(t.t(), b.t(), alpha=ctx.scale)
        wide.mul_(c)
        if bias is not None:  # which is not scaled
            wide.add_(bias * (1 - c))
        if wide is not y:
            y.copy_(wide)
        for_a, for_b, for_m = ctx.needs_input_grad[3:6]
        kept = recompute.to_keep(ctx, x, memo, for_a)
        kept_output = recompute.output_to_keep(ctx, y, memo, for_m)
        ctx.save_for_backward(kept, kept_output, t if for_b else None, weight, bias, a, b, m, norms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        recompute.watch_output(ctx)
        kept, y, t, weight, bias, a, b, m, norms = ctx.saved_tensors
        for_x, _, for_bias, for_a, for_b, for_m = ctx.needs_input_grad[:6]
        x, mask = recompute.from_kept(ctx, kept), keep_mask(ctx, a.dtype)
        c = m / norms
        if torch.is_grad_enabled():  # create_graph=True: all of it has to be part of the graph
            if x is None:
                raise RuntimeError("A second derivative of a low-rank product needs `a` to require a gradient too.")
            t = narrow(a, dropped(x.to(a.dtype), mask))
            y = (F.linear(x, weight) + F.linear(t.t(), b).view(grad.shape) * ctx.scale) * c
        elif y is not None:
            y = widened(y, a.dtype, 2) if bias is None else torch.sub(y, bias.to(a.dtype), out=workspace(2, y, a.dtype))
        if x is not None:
            x = dropped(widened(x, a.dtype), mask)
        flat = grad.reshape(-1, grad.shape[-1])
        low = widened(flat, a.dtype, 1)
        scales = (c * ctx.scale)[:, None]
        grad_x = grad_bias = grad_a = grad_b = grad_m = None
        u = narrow((b * scales).t(), low)
        if for_a:
            grad_a = u @ x.reshape(-1, x.shape[-1])
        if for_b:
            grad_b = (t @ low).t() * scales
        if for_m:
            grad_m = torch.mul(low, y.reshape(low.shape), out=workspace(5, low)).sum(0) / m
        if for_bias:
            grad_bias = flat.sum(0)
        if for_x:  # last: it may use the memory in which what is left of x lies
            rows = (weight * c[:, None]).to(weight.dtype)
            grad_x = input_gradient(flat, u.t(), rows, a, mask).view(ctx.shape)
        return grad_x, None, grad_bias, grad_a, grad_b, grad_m, None, None, None


def _row_norms(v: torch.Tensor) -> torch.Tensor:
    """The norm of each row as a constant; 1 for a row of zeros, which stays one."""
    norms = torch.linalg.vector_norm(v.detach().contiguous(), dim=1)
    return norms.masked_fill(norms == 0, 1.0)
