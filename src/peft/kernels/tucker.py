"""The core of a convolution's Tucker decomposition, contracted with the factor of its inputs."""

from __future__ import annotations

import torch


def tucker(core: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """``Σ_q core[p, q, …] inputs[q, i]`` as a matrix: the inner factor of a convolution's weight.

    Args:
        core: (p, q, *kernel_size).
        inputs: (q, in_channels).

    Returns:
        (p, in_channels · prod(kernel_size)). Times an outer factor (out_channels, p) it is the whole weight as a matrix.
    """
    return torch.einsum("pq...,qi->pi...", core, inputs).flatten(1)


def core_size(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of a core's kernel dimensions as files have them: at least two."""
    return (*kernel_size, *(1,) * (2 - len(kernel_size)))
