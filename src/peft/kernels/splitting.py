"""Splitting a dimension into two factors."""

from __future__ import annotations

import math


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split a dimension into two factors.

    Args:
        dimension: The number to split.
        factor: The first of the two where it divides the number, else a bound of it; -1: no bound.

    Returns:
        ``(m, n)`` with m · n = dimension. Where ``factor`` does not give m, m ≤ n, as near to each other as the bound allows.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = math.isqrt(dimension) if factor <= 0 else min(factor, math.isqrt(dimension))
    smaller = next(m for m in range(bound, 0, -1) if dimension % m == 0)
    return smaller, dimension // smaller
