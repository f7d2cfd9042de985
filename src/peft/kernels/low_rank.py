"""A low-rank product added to what a layer computes, with dropout on its way: ``y + s · (drop(x) aᵀ) bᵀ``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import dropout, recompute
from .modes import autocast, by_hand, no_graph, without_autocast
from .recompute import Memo
from .reweighted import Rule, Tensors, may_reweight, reweighted_linear
from .workspace import widened, workspace


def add_low_rank_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, rate: float = 0.0
) -> torch.Tensor:
    """``y + scale · (drop(x) aᵀ) bᵀ``, as written; see :func:`add_low_rank`."""
    if rate > 0:
        x = F.dropout(x, rate)
    return y + F.linear(F.linear(x, a), b) * scale


def add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    rate: float = 0.0,
    memo: Memo | None = None,
) -> torch.Tensor:
    """``y + scale · (drop(x) aᵀ) bᵀ`` with the scaling and the sum inside the second product.

    Next to the form as written this leaves out two passes over a tensor of y's size forward and one backward. Dropout draws 16
    bits an element (:mod:`peft.kernels.dropout`), and its mask is kept as a seed.

    Args:
        y: (…, out_features).
        x: (…, in_features), the same leading dimensions.
        a: (r, in_features).
        b: (out_features, r).
        scale: Factor of the product.
        rate: Probability of dropping an element of ``x``.
        memo: Allows to recompute ``x`` in the backward pass, where that is sound (:mod:`peft.kernels.recompute`).

    Returns:
        A new tensor of y's shape.

    Saved for backward: ``drop(x) aᵀ``, shape (…, r), and ``x`` unless it can be recomputed; neither ``y`` nor the product.
    """
    plain = rate == 0 and no_graph(x, y, a, b)
    if not plain and not by_hand(x, a, b):
        return _accumulate(y, F.linear(dropout.drop(x, rate) if rate > 0 else x, a), b, scale)
    x, a, b = autocast(x, a, b)
    with without_autocast(x.device.type):
        if plain:
            return _accumulate(y, narrow(a, x).t(), b, scale)
        return _LowRank.apply(x, y, None, None, a, b, scale, rate, memo)


def low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    rate: float = 0.0,
    memo: Memo | None = None,
) -> torch.Tensor:
    """A linear layer together with its low-rank update: ``x Wᵀ + bias + scale · (drop(x) aᵀ) bᵀ``.

    As :func:`add_low_rank` after ``F.linear``, but both products accumulate in place, forward and backward: no further tensor of
    the size of ``x`` or ``y`` is made. For many tokens, without dropout and in float32, the sum of the weights is built instead
    (:func:`~peft.kernels.reweighted.reweighted_linear`), which leaves out two of the six skinny products.

    Factors may be wider than the layer: float32 ones on a layer in half precision. The update is then computed and added in their dtype,
    the sum is rounded once, and what is kept of ``x`` is narrow.

    Args:
        x: (…, in_features).
        weight: (out_features, in_features), frozen.
        bias: (out_features,), frozen or not.
        a: (r, in_features), in the weight's dtype or a wider one.
        b: (out_features, r), likewise.
        scale: Factor of the product.
        rate: Probability of dropping an element of ``x`` on the way to ``a``.
        memo: Allows to recompute ``x`` in the backward pass, where that is sound (:mod:`peft.kernels.recompute`).

    Returns:
        (…, out_features).
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    if rate == 0 and 2 * tokens >= sum(weight.shape) and may_reweight(x, weight, (a, b)):
        return reweighted_linear(LowRank(scale), x, weight, bias, (a, b), memo)
    plain = rate == 0 and no_graph(x, weight, bias, a, b)
    if not plain and (weight.requires_grad or not by_hand(x, a, b)):
        y = F.linear(x, weight, bias)
        if weight.dtype == a.dtype or torch.is_autocast_enabled(x.device.type):
            return add_low_rank(y, x, a, b, scale, rate, memo)
        return add_low_rank(y, x.to(a.dtype), a, b, scale, rate, memo).to(y.dtype)
    x, weight, bias, a, b = autocast(x, weight, bias, a, b)
    with without_autocast(x.device.type):
        if plain:
            return _accumulate(F.linear(x, weight, bias), narrow(a, widened(x, a.dtype)).t(), b, scale, in_place=True)
        return _LowRank.apply(x, None, weight, bias, a, b, scale, rate, memo)


class _LowRank(torch.autograd.Function):
    """Both forms: ``y`` is given, or made from ``weight`` and ``bias``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        rate: float,
        memo: Memo | None,
    ) -> torch.Tensor:
        note_dropout(ctx, x, scale, rate)
        t = narrow(a, dropped(widened(x, a.dtype), keep_mask(ctx, a.dtype)))
        base = y if weight is None else F.linear(x, weight, bias)
        assert base is not None
        out = _accumulate(base, t.t(), b, ctx.scale, in_place=base is not y)
        for_a, for_b = ctx.needs_input_grad[4:6]
        ctx.save_for_backward(recompute.to_keep(ctx, x, memo, for_a), t if for_b else None, weight, a, b)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        kept, t, weight, a, b = ctx.saved_tensors
        x = recompute.from_kept(ctx, kept)
        mask = keep_mask(ctx, a.dtype)
        if x is not None:
            x = dropped(widened(x, a.dtype), mask)
        flat = grad.reshape(-1, grad.shape[-1])
        low = widened(flat, b.dtype, 1)
        u = narrow((b * ctx.scale).t(), low)
        grad_x = grad_y = grad_bias = grad_a = grad_b = None
        if ctx.needs_input_grad[4]:
            grad_a = u @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[5]:
            if torch.is_grad_enabled():  # create_graph=True: t has to be part of the graph
                if x is None:
                    raise RuntimeError("A second derivative of a low-rank product needs `a` to require a gradient too.")
                t = narrow(a, x)
            grad_b = (t @ low).t() * ctx.scale
        if ctx.needs_input_grad[0]:  # last: it may use the memory in which what is left of x lies
            grad_x = input_gradient(flat, u.t(), weight, a, mask).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_y = grad
        if ctx.needs_input_grad[3]:
            grad_bias = flat.sum(0)
        return grad_x, grad_y, None, grad_bias, grad_a, grad_b, None, None, None


class LowRank(Rule):
    """``W' = W + scale · b a``, of factors a, (r, columns), and b, (rows, r).

    Args:
        scale: Factor of the product.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def change(self, weight: torch.Tensor, factors: Tensors, notes: Tensors | None) -> tuple[torch.Tensor, Tensors]:
        a, b = factors
        return torch.addmm(weight, b, a, alpha=self.scale, out=workspace(0, weight)), ()

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, factors: Tensors, notes: Tensors, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = factors
        return low_rank_gradients(grad, x, a, b, self.scale)


def low_rank_gradients(
    grad: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a and b in ``y = scale · (x aᵀ) bᵀ``: ``scale · (grad b)ᵀ x`` and ``scale · gradᵀ (x aᵀ)``.

    Args:
        grad: (tokens, rows).
        x: (tokens, columns).
        a: (r, columns).
        b: (rows, r).
        scale: Factor of the product.
    """
    grad_a = narrow((b * scale).t(), grad) @ x
    return grad_a, (narrow(a, x) @ grad).t() * scale


def note_dropout(ctx: Any, x: torch.Tensor, scale: float, rate: float) -> None:
    """Note in ``ctx`` the product's shape and scale, and what :func:`keep_mask` makes the same mask from in both passes."""
    ctx.shape, ctx.device, ctx.rate = x.shape, x.device, rate
    ctx.scale = scale / dropout.kept_share(rate)  # what dropout keeps is scaled up
    ctx.seed = dropout.draw_seed() if rate > 0 else 0


def keep_mask(ctx: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return dropout.keep_mask(ctx.shape, ctx.device, ctx.rate, ctx.seed, dtype) if ctx.rate > 0 else None


def dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``x ⊙ mask``, in the workspace: it is dead once a product of few rows was made of it. Without a mask ``x``."""
    return x if mask is None else torch.mul(x, mask, out=workspace(0, x))


def narrow(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``(x aᵀ)ᵀ`` for few rows of ``a``, shape (r, tokens).

    In this layout each of the products around it, forward and backward, reads its large operand row by row: on CPUs two to
    four times faster than the layout (tokens, r).
    """
    return a.contiguous() @ x.reshape(-1, x.shape[-1]).t()


def _accumulate(
    y: torch.Tensor, t: torch.Tensor, b: torch.Tensor, scale: float, in_place: bool = False
) -> torch.Tensor:
    """``y + scale · t bᵀ``. Where the update is wider than y, so is the sum; ``in_place`` it is rounded to y's dtype."""
    if t.dtype != y.dtype or t.dim() < 2:  # a half-precision base under float32 adapters: the sum is rounded once
        if not in_place or t.dim() < 2:
            return y + (F.linear(t, b) * scale).view(y.shape)
        wide = widened(y, t.dtype).view(-1, y.shape[-1])
        return y.copy_(wide.addmm_(t, b.t(), alpha=scale).view(y.shape))
    flat, low = y.reshape(-1, y.shape[-1]), t.reshape(-1, t.shape[-1])
    if in_place:
        flat.addmm_(low, b.t(), alpha=scale)
        return y
    return torch.addmm(flat, low, b.t(), alpha=scale).view(y.shape)


def input_gradient(
    grad: torch.Tensor, u: torch.Tensor, weight: torch.Tensor | None, a: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """``grad W + mask ⊙ (u a)``, shape (tokens, in_features); without the first part where there is no ``weight``."""
    mask = None if mask is None else mask.view(-1, a.shape[1])
    if weight is None or torch.is_grad_enabled():  # create_graph=True: nothing in place
        through = u @ a if mask is None else (u @ a) * mask
        return through if weight is None else grad @ weight + through
    base = grad @ weight
    if base.dtype != a.dtype:
        through = torch.mm(u, a, out=workspace(0, base, a.dtype))
        return base.add_(through if mask is None else through.mul_(mask))
    return base.addmm_(u, a) if mask is None else base.addcmul_(torch.mm(u, a, out=workspace(0, base)), mask)
