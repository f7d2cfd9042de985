"""A Kronecker product added to what a layer computes, as small products on a reshaped input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import recompute
from .modes import autocast, by_hand
from .recompute import Memo


def add_kronecker_reference(
    y: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, inner: torch.Tensor | None, outer: torch.Tensor, scale: float
) -> torch.Tensor:
    """``y + scale · (w1 ⊗ (outer inner)) x``, as written; see :func:`add_kronecker`."""
    w2 = outer if inner is None else outer @ inner
    return y + x @ torch.kron(w1, w2).mT * scale


def add_kronecker(
    y: torch.Tensor | None,
    x: torch.Tensor,
    w1: torch.Tensor,
    inner: torch.Tensor | None,
    outer: torch.Tensor,
    scale: float,
    memo: Memo | None = None,
) -> torch.Tensor:
    """``y + scale · (w1 ⊗ w2) x``, where ``w2`` is ``outer inner``, or ``outer`` alone.

    With x cut into blocks X of shape (blocks in, n), ``(w1 ⊗ w2) x`` is ``w1 X w2ᵀ`` (Van Loan 2000, *The ubiquitous Kronecker
    product*): two small products, three where ``w2`` has factors. For a vector they cost about
    k · (columns + rows) + k · blocks in · blocks out operations, k the rank or the columns of ``w2``, instead of rows · columns.

    Args:
        y: (…, rows); where it is ``None``, nothing is added to.
        x: (…, columns), the same leading dimensions.
        w1: (blocks out, blocks in).
        inner: (k, n) with columns = blocks in · n, or ``None``.
        outer: (m, k) with rows = blocks out · m; (m, n) where there is no ``inner``.
        scale: Factor of the product.
        memo: Allows to recompute ``x`` in the backward pass, where that is sound (:mod:`peft.kernels.recompute`).

    Returns:
        A new tensor (…, rows).

    Saved for backward: the factors, and ``x`` unless it can be recomputed. What lies between the products is computed again.
    """
    if not by_hand(x, w1, inner, outer):
        return _accumulate(y, _shape(x, w1, outer), _mixed(x, w1, inner), outer, scale)
    x, w1, inner, outer = autocast(x, w1, inner, outer)
    with torch.autocast(x.device.type, enabled=False):
        return _Kronecker.apply(x, y, None, None, w1, inner, outer, scale, memo)


def kronecker_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    w1: torch.Tensor,
    inner: torch.Tensor | None,
    outer: torch.Tensor,
    scale: float,
    memo: Memo | None = None,
) -> torch.Tensor:
    """A linear layer together with its update: ``x Wᵀ + bias + scale · (w1 ⊗ w2) x``.

    As :func:`add_kronecker` after ``F.linear``, but both products accumulate in place, forward and backward.

    Args:
        x: (…, columns).
        weight: (rows, columns), frozen.
        bias: (rows,), frozen or not.
        w1: (blocks out, blocks in).
        inner: (k, n), or ``None``.
        outer: (m, k), or (m, n).
        scale: Factor of the Kronecker product.
        memo: As in :func:`add_kronecker`.

    Returns:
        (…, rows).
    """
    if not by_hand(x, w1, inner, outer) or weight.requires_grad or weight.dtype != w1.dtype:
        return add_kronecker(F.linear(x, weight, bias), x, w1, inner, outer, scale, memo)
    x, weight, bias, w1, inner, outer = autocast(x, weight, bias, w1, inner, outer)
    with torch.autocast(x.device.type, enabled=False):
        return _Kronecker.apply(x, None, weight, bias, w1, inner, outer, scale, memo)


class _Kronecker(torch.autograd.Function):
    """Both forms: ``y`` is given, or made from ``weight`` and ``bias``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        w1: torch.Tensor,
        inner: torch.Tensor | None,
        outer: torch.Tensor,
        scale: float,
        memo: Memo | None,
    ) -> torch.Tensor:
        ctx.scale, ctx.shape = scale, x.shape
        base = y if weight is None else F.linear(x, weight, bias)
        out = _accumulate(base, _shape(x, w1, outer), _mixed(x, w1, inner), outer, scale, in_place=base is not y)
        for_factors = any(ctx.needs_input_grad[4:7])
        ctx.save_for_backward(recompute.to_keep(ctx, x, memo, for_factors), weight, w1, inner, outer)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        kept, weight, w1, inner, outer = ctx.saved_tensors
        x = recompute.from_kept(ctx, kept)
        needs_x, needs_y, _, needs_bias, needs_w1, needs_inner, needs_outer, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        low = flat if flat.dtype == outer.dtype else flat.to(outer.dtype)
        low = low.reshape(-1, outer.shape[0])  # (tokens · blocks out, m)
        g = (low @ (outer * ctx.scale)).view(len(flat), len(w1), outer.shape[1])
        grad_x = grad_w1 = grad_inner = grad_outer = None
        if needs_outer:
            grad_outer = low.mT @ _mixed(x, w1, inner) * ctx.scale
        if needs_w1:
            grad_w1 = torch.tensordot(g, _read(x, w1, inner), ([0, 2], [0, 2]))
        if needs_x or needs_inner:
            back = _mix(g, w1.mT).flatten(0, 1)  # (tokens · blocks in, k)
            if needs_inner:
                grad_inner = back.mT @ _blocks(x, w1).flatten(0, 1)
            if needs_x:
                grad_x = _input_gradient(flat, weight, back, inner).view(ctx.shape)
        grad_bias = flat.sum(0) if needs_bias else None
        return grad_x, grad if needs_y else None, None, grad_bias, grad_w1, grad_inner, grad_outer, None, None


def _blocks(x: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """The input as (tokens, blocks in, n)."""
    tokens = x.shape[:-1].numel()
    return x.reshape(tokens, w1.shape[1], x.shape[-1] // w1.shape[1])


def _mix(t: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """Combine the blocks of each vector: (tokens, blocks in, k) becomes (tokens, blocks out, k)."""
    tokens, blocks_in, k = t.shape
    # As one product of matrices: what torch does with a batch of them depends on requires_grad.
    mixed = t.transpose(1, 2).reshape(-1, blocks_in) @ w1.mT
    return mixed.view(tokens, k, len(w1)).transpose(1, 2)


def _mixed(x: torch.Tensor, w1: torch.Tensor, inner: torch.Tensor | None) -> torch.Tensor:
    """What ``outer`` is applied to: (tokens · blocks out, k)."""
    return _mix(_read(x, w1, inner), w1).flatten(0, 1)


def _read(x: torch.Tensor, w1: torch.Tensor, inner: torch.Tensor | None) -> torch.Tensor:
    """What ``w1`` is applied to: (tokens, blocks in, k)."""
    blocks = _blocks(x, w1)
    return blocks if inner is None else (blocks.flatten(0, 1) @ inner.mT).view(*blocks.shape[:2], len(inner))


def _shape(x: torch.Tensor, w1: torch.Tensor, outer: torch.Tensor) -> tuple[int, ...]:
    return *x.shape[:-1], len(w1) * len(outer)


def _accumulate(
    y: torch.Tensor | None,
    shape: tuple[int, ...],
    t: torch.Tensor,
    outer: torch.Tensor,
    scale: float,
    in_place: bool = False,
) -> torch.Tensor:
    """``y + scale · t outerᵀ``, of this shape."""
    if y is None or t.dtype != y.dtype:  # a half-precision base under float32 adapters: the sum is rounded once
        product = (t @ (outer.mT * scale)).view(*shape)
        return product if y is None else y + product
    flat = y.reshape(len(t), len(outer))
    if in_place:
        flat.addmm_(t, outer.mT, alpha=scale)
        return y
    return torch.addmm(flat, t, outer.mT, alpha=scale).view(y.shape)


def _input_gradient(
    grad: torch.Tensor, weight: torch.Tensor | None, back: torch.Tensor, inner: torch.Tensor | None
) -> torch.Tensor:
    """``grad W + back inner``, shape (tokens, columns); without the first part where there is no ``weight``."""
    if weight is None:
        return back if inner is None else back @ inner
    base = grad @ weight
    if torch.is_grad_enabled():  # create_graph=True: nothing in place
        return base + (back if inner is None else back @ inner).reshape(base.shape)
    if inner is None:
        return base.add_(back.reshape(base.shape))
    base.view(len(back), -1).addmm_(back, inner)
    return base
