"""Adding a low-rank product to what a layer has computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def add_low_rank_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """``y + scale · (x aᵀ) bᵀ``, as written; see :func:`add_low_rank`."""
    return y + F.linear(F.linear(x, a), b) * scale


def add_low_rank(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale · (x aᵀ) bᵀ`` with the scaling and the sum inside the second product.

    Next to the form as written this leaves out two passes over a tensor of y's size forward and one backward.

    Args:
        y: (…, out_features).
        x: (…, in_features), the same leading dimensions.
        a: (r, in_features).
        b: (out_features, r).
        scale: Factor of the product.

    Returns:
        A new tensor of y's shape.

    Saved for backward: ``x`` and ``x aᵀ``, shape (…, r); neither ``y`` nor the product.
    """
    t = F.linear(x, a)
    if t.dtype != y.dtype or t.dim() < 2:
        return y + F.linear(t, b) * scale
    return torch.addmm(y.reshape(-1, y.shape[-1]), t.reshape(-1, t.shape[-1]), b.t(), alpha=scale).view(y.shape)
