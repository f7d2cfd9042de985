"""A Kronecker product added to what a layer computes, as small products on a reshaped input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import recompute
from .modes import autocast, by_hand, without_autocast
from .recompute import Memo
from .reweighted import Rule, Tensors, may_reweight, reweighted_linear
from .workspace import widened, workspace


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
    with without_autocast(x.device.type):
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

    As :func:`add_kronecker` after ``F.linear``, but both products accumulate in place, forward and backward. For many tokens, in
    float32, the sum of the weights is built instead (:func:`~peft.kernels.reweighted.reweighted_linear`). Factors may be wider than
    the layer: the update is then computed and added in their dtype, and the sum is rounded once.

    Args:
        x: (…, columns).
        weight: (rows, columns), frozen.
        bias: (rows,), frozen or not.
        w1: (blocks out, blocks in), in the weight's dtype or a wider one, as the others.
        inner: (k, n), or ``None``.
        outer: (m, k), or (m, n).
        scale: Factor of the Kronecker product.
        memo: As in :func:`add_kronecker`.

    Returns:
        (…, rows).
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    if 2 * tokens >= sum(weight.shape) and may_reweight(x, weight, (w1, inner, outer)):
        factors = (w1, outer) if inner is None else (w1, outer, inner)
        return reweighted_linear(Kronecker(scale), x, weight, bias, factors, memo)
    if not by_hand(x, w1, inner, outer) or weight.requires_grad:
        y = F.linear(x, weight, bias)
        if weight.dtype == w1.dtype or torch.is_autocast_enabled(x.device.type):
            return add_kronecker(y, x, w1, inner, outer, scale, memo)
        return add_kronecker(y, x.to(w1.dtype), w1, inner, outer, scale, memo).to(y.dtype)
    x, weight, bias, w1, inner, outer = autocast(x, weight, bias, w1, inner, outer)
    with without_autocast(x.device.type):
        return _Kronecker.apply(x, None, weight, bias, w1, inner, outer, scale, memo)


def kronecker_stacked(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Several Kronecker products, each with a few vectors of its own: ``(w1 ⊗ w2) x``.

    Args:
        x: (products, vectors, blocks in · n).
        w1: (products, blocks out, blocks in).
        w2: (products, m, n).

    Returns:
        (products, vectors, blocks out · m).
    """
    products, vectors, _ = x.shape
    read = torch.bmm(x.reshape(products, -1, w2.shape[2]), w2.mT).view(products, vectors, w1.shape[2], -1)
    return torch.matmul(w1.unsqueeze(1), read).reshape(products, vectors, -1)


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
        out = _accumulate(
            base, _shape(x, w1, outer), _mixed(widened(x, w1.dtype), w1, inner), outer, scale, in_place=base is not y
        )
        for_factors = any(ctx.needs_input_grad[4:7])
        ctx.save_for_backward(recompute.to_keep(ctx, x, memo, for_factors), weight, w1, inner, outer)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        kept, weight, w1, inner, outer = ctx.saved_tensors
        x = recompute.from_kept(ctx, kept)
        needs_x, needs_y, _, needs_bias, *needed = ctx.needs_input_grad[:7]
        flat = grad.reshape(-1, grad.shape[-1])
        low = widened(flat, outer.dtype, 1)
        g = _written(low, outer, ctx.scale)
        grad_x = grad_bias = None
        factors: list[torch.Tensor | None] = [None] * 3
        if any(needed):
            factors = _gradients(low, g, widened(x, w1.dtype), w1, inner, outer, ctx.scale)
        if needs_x:
            grad_x = _input_gradient(flat, weight, _mix(g, w1.t()).t(), inner).reshape(ctx.shape)
        if needs_bias:
            grad_bias = flat.sum(0)
        return grad_x, grad if needs_y else None, None, grad_bias, *factors, None, None


class Kronecker(Rule):
    """``W' = W + scale · w1 ⊗ (outer inner)``, of the factors ``w1``, ``outer`` and, where there is one, ``inner``.

    The Kronecker product itself is never there: its elements are made as they are added.

    Args:
        scale: Factor of the product.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def change(self, weight: torch.Tensor, factors: Tensors, notes: Tensors | None) -> tuple[torch.Tensor, Tensors]:
        w1, outer, *inner = factors
        w2 = outer @ inner[0] if inner else outer
        first, second = w1[:, None, :, None], w2[None, :, None, :]
        blocks = weight.unflatten(0, (len(w1), -1)).unflatten(2, (w1.shape[1], -1))
        out = workspace(0, weight)
        if out is None:
            return torch.addcmul(blocks, first, second, value=self.scale).view(weight.shape), ()
        torch.addcmul(blocks, first, second, value=self.scale, out=out.view(blocks.shape))
        return out, ()

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, factors: Tensors, notes: Tensors, y: torch.Tensor | None
    ) -> list[torch.Tensor]:
        w1, outer, *rest = factors
        inner = rest[0] if rest else None
        g = _written(grad, outer, self.scale)
        grad_w1, grad_inner, grad_outer = _gradients(grad, g, x, w1, inner, outer, self.scale)
        return [grad_w1, grad_outer] if inner is None else [grad_w1, grad_outer, grad_inner]


# Between the products vectors lie as (k, tokens · blocks): mixing blocks is then one product without a copy, and each product with a
# large operand reads it row by row.


def _blocks(x: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """The input as (tokens · blocks in, n)."""
    return x.reshape(-1, x.shape[-1] // w1.shape[1])


def _read(x: torch.Tensor, w1: torch.Tensor, inner: torch.Tensor | None) -> torch.Tensor:
    """What ``w1`` is applied to: (k, tokens · blocks in)."""
    blocks = _blocks(x, w1).t()
    return blocks if inner is None else inner @ blocks


def _mix(t: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """Combine the blocks of each vector: (k, tokens · blocks in) becomes (k, tokens · blocks out)."""
    return (t.reshape(-1, w1.shape[1]) @ w1.t()).view(len(t), -1)


def _mixed(x: torch.Tensor, w1: torch.Tensor, inner: torch.Tensor | None) -> torch.Tensor:
    """What ``outer`` is applied to: (tokens · blocks out, k)."""
    return _mix(_read(x, w1, inner), w1).t()


def _written(grad: torch.Tensor, outer: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of what ``outer`` is applied to, times the scale: (k, tokens · blocks out)."""
    return (outer * scale).t() @ grad.reshape(-1, len(outer)).t()


def _gradients(
    grad: torch.Tensor,
    g: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    inner: torch.Tensor | None,
    outer: torch.Tensor,
    scale: float,
) -> list[Any]:
    """Gradients of ``w1``, ``inner`` and ``outer``; ``g`` is what :func:`_written` gives."""
    read = _read(x, w1, inner)
    grad_w1 = g.reshape(-1, len(w1)).t() @ read.reshape(-1, w1.shape[1])
    grad_inner = None if inner is None else _mix(g, w1.t()) @ _blocks(x, w1)
    grad_outer = (_mix(read, w1) @ grad.reshape(-1, len(outer))).t() * scale
    return [grad_w1, grad_inner, grad_outer]


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
        return product if y is None else y.add_(product) if in_place else y + product
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
    if inner is None or base.dtype != back.dtype:
        back = back if inner is None else back @ inner
        return base.add_(back.reshape(base.shape))
    base.view(len(back), -1).addmm_(back, inner)
    return base
