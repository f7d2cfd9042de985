"""Combining the tensors of several adapters into one: weighted sums, pruning, sign election, and low-rank factors of a sum.

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099. Task arithmetic: Ilharco et al. 2022,
arXiv 2212.04089.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch

SignMethod = Literal["total", "frequency"]

# -- pruning ---------------------------------------------------------------------------------------------------------


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the entries of largest magnitude and set the others to zero (TIES, step "trim").

    Args:
        tensor: Any shape.
        density: Fraction of entries to keep, rounded down to a whole number of entries.

    Returns:
        A tensor of the same shape.
    """
    keep = int(density * tensor.numel())
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(keep).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep each entry with probability ``density`` and set the others to zero (DARE, eq. 5: drop).

    Args:
        tensor: Any shape.
        density: Probability of keeping an entry.
        rescale: Divide what is kept by ``density``, so that the expectation stays as it was (DARE, eq. 6: rescale).

    Returns:
        A tensor of the same shape. Draws from torch's default generator.
    """
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale and density > 0 else kept


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """Prune a tensor.

    Args:
        tensor: Any shape.
        density: Fraction, or probability, of entries to keep; 1 keeps all. More is 1, with a warning.
        method: ``"magnitude"`` or ``"random"``.
        rescale: For random pruning: divide what is kept by ``density``.

    Raises:
        ValueError: A negative density, or another method.
    """
    if method not in ("magnitude", "random"):
        raise ValueError(f"Unknown method of pruning {method!r}. Use 'magnitude' or 'random'.")
    if not density >= 0:
        raise ValueError(f"Density should be >= 0, got {density}.")
    if density > 1:
        warnings.warn(f"The density {density} is more than 1: nothing is pruned.", stacklevel=2)
    if density >= 1:
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale)


# -- signs -----------------------------------------------------------------------------------------------------------


def calculate_majority_sign_mask(tensor: torch.Tensor, method: SignMethod = "total") -> torch.Tensor:
    """Which entries have the sign that most of the tensors agree on (TIES, step "elect"); a draw elects the plus.

    Args:
        tensor: (n, …), the n tensors.
        method: ``"total"``: the sign with the larger sum of magnitudes; ``"frequency"``: the more frequent one.

    Returns:
        Booleans, (n, …).

    Raises:
        ValueError: Another method.
    """
    if method not in ("total", "frequency"):
        raise ValueError(f"Unknown majority_sign_method {method!r}. Use 'total' or 'frequency'.")
    votes = tensor if method == "total" else tensor.sign()
    return torch.where(votes.sum(dim=0) >= 0, tensor > 0, tensor < 0)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tensors that agree with the elected sign, entry by entry (TIES, step "disjoint merge").

    Args:
        task_tensors: (n, …).
        majority_sign_mask: (n, …).

    Returns:
        (…); zero where no tensor agrees.
    """
    agreeing = majority_sign_mask.sum(dim=0)
    return (task_tensors * majority_sign_mask).sum(dim=0) / agreeing.clamp(min=1)


# -- sums ------------------------------------------------------------------------------------------------------------


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights, (n,), shaped to broadcast against the tensors, (n, …)."""
    return weights.to(task_tensors.dtype).reshape(-1, *(1 for _ in task_tensors.shape[1:]))


def _weighted(stacked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return stacked * reshape_weight_task_tensors(stacked, weights)


def task_arithmetic(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ wᵢ Tᵢ for n tensors of one shape and weights (n,)."""
    return _weighted(torch.stack(list(task_tensors)), weights).sum(dim=0)


def magnitude_prune(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Σ wᵢ Pᵢ where Pᵢ keeps the ``density`` largest entries of Tᵢ."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """TIES: trim each tensor, elect a sign for each entry, and take the mean of the weighted entries that have it.

    Args:
        task_tensors: n tensors of one shape.
        weights: (n,).
        density: Fraction of entries of each tensor to keep.
        majority_sign_method: See :func:`calculate_majority_sign_mask`.
    """
    return _elect_and_merge([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """DARE: Σ wᵢ Pᵢ where Pᵢ is Tᵢ with entries dropped at random and the others rescaled."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def dare_ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """:func:`ties`, with entries dropped at random and rescaled in place of the trimming."""
    dropped = [prune(t, density, "random", rescale=True) for t in task_tensors]
    return _elect_and_merge(dropped, weights, majority_sign_method)


def _elect_and_merge(pruned: list[torch.Tensor], weights: torch.Tensor, method: SignMethod) -> torch.Tensor:
    stacked = torch.stack(pruned)
    return disjoint_merge(_weighted(stacked, weights), calculate_majority_sign_mask(stacked, method))


# -- low-rank factors ------------------------------------------------------------------------------------------------


def factors_of_matrix(
    matrix: torch.Tensor, rank: int, *, clamp: float | None = None, driver: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of a rank for a matrix, by its singular value decomposition U Σ Vᵀ.

    Args:
        matrix: (m, n).
        rank: Rank r of the factors; beyond the matrix's own they are filled up with zeros.
        clamp: Clamp the entries of both factors to this quantile of them, on both sides of zero.
        driver: LAPACK driver on CUDA; see ``torch.linalg.svd``.

    Returns:
        B, (m, r), which holds U Σ, and A, (r, n), which holds Vᵀ, with B A ≈ matrix.

    Raises:
        ValueError: That quantile is not positive.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return _truncate(u * s, vt, rank, clamp)


def factors_of_product(
    b: torch.Tensor, a: torch.Tensor, rank: int, *, clamp: float | None = None, driver: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`factors_of_matrix` of b a, without making that product.

    With b = Q₁ R₁ and aᵀ = Q₂ R₂ the small matrix R₁ R₂ᵀ, (k, k), has the singular values of b a. This costs
    O((m + n) k²) in place of O(m n min(m, n)).

    Args:
        b: (m, k).
        a: (k, n).
        rank: As there, and so are ``clamp`` and ``driver``.
    """
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False, driver=driver)
    return _truncate(q1 @ (u * s), vt @ q2.T, rank, clamp)


def _truncate(b: torch.Tensor, a: torch.Tensor, rank: int, clamp: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = b[:, :rank], a[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        if limit <= 0:
            raise ValueError(
                f"the quantile {clamp} of the factors' entries is {limit.item():.3g}, and clamping to it leaves nothing"
            )
        b, a = b.clamp(-limit, limit), a.clamp(-limit, limit)
    return pad_to(b, (b.shape[0], rank)), pad_to(a, (rank, a.shape[1]))


def pad_to(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor filled up with zeros behind each dimension, to a shape that is nowhere smaller than its own."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    padded = tensor.new_zeros(tuple(shape))
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Frobenius norm of b a, for b (m, k) and a (k, n), from two k × k products: ‖b a‖² = Σ (bᵀ b) ⊙ (a aᵀ)."""
    b, a = b.double(), a.double()
    return max(((b.T @ b) * (a @ a.T)).sum().item(), 0.0) ** 0.5
