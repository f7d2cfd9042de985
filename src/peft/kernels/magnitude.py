"""A low-rank update of a weight's rows together with their lengths."""

from __future__ import annotations

from typing import ClassVar

import torch

from .low_rank import low_rank_gradients
from .reweighted import Rule, Tensors
from .workspace import workspace


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
        norms = notes[0] if notes else torch.linalg.vector_norm(v.detach().contiguous(), dim=1)
        norms = norms.masked_fill(norms == 0, 1.0)  # a row of zeros stays one
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
