"""Hadamard products of two low-rank matrices, built densely or turned into one low-rank product."""

from __future__ import annotations

from typing import Any

import torch


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
        w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
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
        w1_a: (rows, r).
        w1_b: (r, columns).
        w2_a: (rows, r).
        w2_b: (r, columns).

    Returns:
        Inner factor (r², columns), and outer factor (rows, r²): their product, outer times inner, is that of :func:`hadamard`.
    """
    inner = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
    outer = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)
    return inner, outer


def factors_are_cheaper(tokens: int, rows: int, columns: int, r: int) -> bool:
    """Whether applying :func:`khatri_rao_factors` costs fewer operations than building :func:`hadamard` and applying that.

    Args:
        tokens: How many vectors the matrix is applied to.
        rows: Of the matrix.
        columns: Of the matrix.
        r: Rank of the two products.
    """
    return (tokens + 1) * r * r * (rows + columns) <= (tokens + 2 * r + 1) * rows * columns
