"""Hadamard products of two low-rank matrices, built densely or turned into one low-rank product."""

from __future__ import annotations

from typing import Any

import torch

from .low_rank import narrow
from .reweighted import Rule, Tensors
from .workspace import workspace


def hadamard_reference(w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor) -> torch.Tensor:
    """``(w1_a w1_b) ⊙ (w2_a w2_b)``, as written; see :func:`hadamard`."""
    return (w1_a @ w1_b) * (w2_a @ w2_b)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor) -> torch.Tensor:
        return hadamard_reference(w1_a, w1_b, w2_a, w2_b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return _dense_gradients(grad, *ctx.saved_tensors)


def _dense_gradients(
    grad: torch.Tensor, w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    grad_1, grad_2 = grad * (w2_a @ w2_b), grad * (w1_a @ w1_b)
    return grad_1 @ w1_b.mT, w1_a.mT @ grad_1, grad_2 @ w2_b.mT, w2_a.mT @ grad_2


def hadamard(w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor) -> torch.Tensor:
    """``(w1_a w1_b) ⊙ (w2_a w2_b)``, a matrix of rank up to r² from two products of rank r.

    Args:
        w1_a: (rows, r).
        w1_b: (r, columns).
        w2_a: (rows, r).
        w2_b: (r, columns).

    Returns:
        (rows, columns).

    Saved for backward: the four factors; as written two more matrices of the result's size are. They are computed again, which
    costs 4 · r · rows · columns operations.
    """
    if torch.is_autocast_enabled(w1_a.device.type):  # which would not be on in the backward pass
        return hadamard_reference(w1_a, w1_b, w2_a, w2_b)
    return _Hadamard.apply(w1_a, w1_b, w2_a, w2_b)  # type: ignore[no-untyped-call]


def khatri_rao_factors(
    w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rank r² of :func:`hadamard`, so that it can be applied without being built.

    ``Σ_p w1_a[o, p] w1_b[p, i] · Σ_q w2_a[o, q] w2_b[q, i]`` is a sum over the pairs (p, q): the outer factor is the row-wise
    Khatri–Rao product of the two ``a``, the inner one the column-wise product of the two ``b``.

    Args:
        w1_a: (…, rows, r), with any dimensions in front, for several products at once.
        w1_b: (…, r, columns).
        w2_a: (…, rows, r).
        w2_b: (…, r, columns).

    Returns:
        Inner factor (r², columns), and outer factor (rows, r²): their product, outer times inner, is that of :func:`hadamard`.
    """
    inner = (w1_b.unsqueeze(-2) * w2_b.unsqueeze(-3)).flatten(-3, -2)
    outer = (w1_a.unsqueeze(-1) * w2_a.unsqueeze(-2)).flatten(-2)
    return inner, outer


def hadamard_stacked(
    x: torch.Tensor, w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a_t: torch.Tensor, w2_b: torch.Tensor
) -> torch.Tensor:
    """Several products of :func:`hadamard`, each with a few vectors of its own: ``((w1_a w1_b) ⊙ (w2_a w2_b)) x``.

    With T = (w1_b ⊙ x) w2_bᵀ, of shape (r, r), an output is ``Σ_q w2_a[o, q] (w1_a T)[o, q]``. It costs as many operations as going
    through :func:`khatri_rao_factors`, and reads the factors as they are, r times less than those. One of them is wanted transposed, so
    that all passes over elements run along rows.

    Args:
        x: (products, vectors, columns).
        w1_a: (products, rows, r).
        w1_b: (products, r, columns).
        w2_a_t: (products, r, rows).
        w2_b: (products, r, columns).

    Returns:
        (products, vectors, rows).
    """
    products, vectors, _ = x.shape
    r = w1_b.shape[1]
    t = torch.bmm((x.unsqueeze(2) * w1_b.unsqueeze(1)).flatten(1, 2), w2_b.mT)  # (products, vectors · r, r)
    t = t.view(products, vectors, r, r).permute(0, 3, 1, 2).reshape(products, r * vectors, r)
    y = torch.bmm(t, w1_a.mT).view(products, r, vectors, -1)
    return y.mul_(w2_a_t.unsqueeze(2)).sum(1)


class Hadamard(Rule):
    """``W' = W + scale · (w1_a w1_b) ⊙ (w2_a w2_b)``, of the four factors of :func:`hadamard`.

    The gradients go through the factors of :func:`khatri_rao_factors`, four products of width r², or, where r² is no small number,
    through ``gradᵀ x``.

    Args:
        scale: Factor of the product.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @staticmethod
    def pays(tokens: int, rows: int, columns: int, r: int) -> bool:
        """Whether building W', twice a step, costs less than two products of width r² with all tokens.

        Args:
            tokens: How many vectors the weight is applied to.
            rows: Of the weight.
            columns: Of the weight.
            r: Rank of the two products.
        """
        passes = (
            20  # what reading and writing an element costs next to a multiplication in a product, all passes together
        )
        return tokens * r * r * (rows + columns) >= 2 * rows * columns * (2 * r + passes)

    def change(self, weight: torch.Tensor, factors: Tensors, notes: Tensors | None) -> tuple[torch.Tensor, Tensors]:
        w1_a, w1_b, w2_a, w2_b = factors
        first = torch.mm(w1_a, w1_b, out=workspace(1, weight))
        second = torch.mm(w2_a, w2_b, out=workspace(2, weight))
        out = workspace(0, weight)
        return torch.addcmul(weight, first, second, value=self.scale, out=out), ()

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, factors: Tensors, notes: Tensors, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        w1_a, w1_b, w2_a, w2_b = factors
        r, (tokens, rows), columns = w1_b.shape[0], grad.shape, x.shape[1]
        if 2 * tokens * r * r * (rows + columns) > (tokens + 4 * r) * rows * columns:
            return _dense_gradients(grad.t() @ x * self.scale, *factors)
        inner, outer = khatri_rao_factors(*factors)
        # Of both Khatri–Rao factors, (r of the first, r of the second, columns or rows).
        grad_inner = (narrow((outer * self.scale).t(), grad) @ x).unflatten(0, (r, r))
        grad_outer = (narrow(inner, x) @ grad).unflatten(0, (r, r))
        return (
            (grad_outer * w2_a.t()).sum(1).t() * self.scale,
            (grad_inner * w2_b).sum(1),
            (grad_outer * w1_a.t().unsqueeze(1)).sum(0).t() * self.scale,
            (grad_inner * w1_b.unsqueeze(1)).sum(0),
        )


def factors_are_cheaper(tokens: int, rows: int, columns: int, r: int) -> bool:
    """Whether applying :func:`khatri_rao_factors` costs fewer operations than building :func:`hadamard` and applying that.

    Args:
        tokens: How many vectors the matrix is applied to.
        rows: Of the matrix.
        columns: Of the matrix.
        r: Rank of the two products.
    """
    return (tokens + 1) * r * r * (rows + columns) <= (tokens + 2 * r + 1) * rows * columns
