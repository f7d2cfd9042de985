"""Starts of A and B that are read off the weight: PiSSA and OLoRA, and one from orthogonal halves."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

NITER = re.compile(r"pissa_niter_(\d+)")


class Start(nn.Module):
    """A₀ and B₀, in which an adapter starts and which it is measured against: its change is ``s (B A − B₀ A₀)``.

    The base weight W thus stays what it is, and ``W − s B₀ A₀`` is never stored: the layer computes the base model's output with
    the adapter fresh, off or deleted, and other adapters on it are not concerned. Buffers outside the state dict: the start is
    found again from the weight.

    Args:
        a: A₀, shape (r, columns).
        b: B₀, shape (rows, r).
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)


def reads_weight(start: bool | str) -> bool:
    """Whether a value of ``init_lora_weights`` names a start that is read off the weight."""
    return isinstance(start, str) and (start in ("pissa", "olora") or NITER.fullmatch(start) is not None)


def decompose(start: str, weight: torch.Tensor, rank: int, scaling: float) -> Start:
    """A₀ and B₀ of a start that is read off the weight.

    Args:
        start: ``pissa``, ``pissa_niter_N`` or ``olora``.
        weight: The weight as a matrix, (rows, columns).
        rank: r.
        scaling: s.

    Raises:
        ValueError: The weight has no such decomposition, or is not there to be read.
    """
    if weight.device.type == "meta":
        raise ValueError(
            f"init_lora_weights={start!r} is read off the base weight, which is on the meta device. Load the base model's weights "
            "first"
        )
    if rank > min(weight.shape):
        raise ValueError(
            f"init_lora_weights={start!r} takes a rank of at most {min(weight.shape)} for a weight of shape "
            f"{tuple(weight.shape)}, got r={rank}"
        )
    if scaling <= 0:
        raise ValueError(f"init_lora_weights={start!r} needs a positive scaling, got {scaling} (from lora_alpha)")
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if start == "olora":
            return olora(weight, rank)
        steps = NITER.fullmatch(start)
        return pissa(weight, rank, scaling, None if steps is None else int(steps.group(1)))


def pissa(weight: torch.Tensor, rank: int, scaling: float, niter: int | None = None) -> Start:
    """The principal singular values and vectors (Meng et al. 2024, arXiv 2404.02948, eq. 2 and 3).

    ``W = U S Vᵀ``; A₀ = √S_r V_rᵀ and B₀ = U_r √S_r, each over √s, so that s B₀ A₀ is the best approximation of W of rank r.

    Args:
        weight: W, (rows, columns).
        rank: r.
        scaling: s.
        niter: Steps of a randomised decomposition with twice the rank (Halko et al. 2011, arXiv 0909.4061), which is much faster for
            large weights; the exact one when not given. The random numbers are the same every time, so that reading a saved adapter
            finds the same start.
    """
    if niter is None:
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
        u, values, v = u[:, :rank], values[:rank], v[:rank]
    else:
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=niter)
        u, values, v = u[:, :rank], values[:rank], v[:, :rank].T
    root = (values / scaling).sqrt()
    return Start(root[:, None] * v, u * root)


def olora(weight: torch.Tensor, rank: int) -> Start:
    """The first columns and rows of W = Q R (Büyükakyüz 2024, arXiv 2406.01775): B₀ = Q_r and A₀ = R_r."""
    q, r = torch.linalg.qr(weight)
    return Start(r[:rank].contiguous(), q[:, :rank].contiguous())


def orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Fill A and B so that neither is zero but B A is.

    The rows of an orthogonal matrix of size r are dealt out in turn; B's rows are combinations of one half, A's columns of the
    other, so every row of B is orthogonal to every column of A.

    Args:
        a: A, (r, columns), filled in place.
        b: B, (rows, r), filled in place.

    Raises:
        ValueError: r is odd.
    """
    rank, columns = a.shape
    if rank % 2:
        raise ValueError(f"init_lora_weights='orthogonal' halves the rank, so it has to be even, got r={rank}")
    basis, _ = torch.linalg.qr(torch.randn(rank, rank))
    deviation = 0.1
    a.copy_(basis[0::2].T @ torch.randn(rank // 2, columns) * deviation)
    b.copy_(torch.randn(b.shape[0], rank // 2) @ basis[1::2] * deviation)


def as_plain(
    a: torch.Tensor, b: torch.Tensor, start_a: torch.Tensor, start_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rank 2r of ``B A − B₀ A₀``, first A's, then B's; whatever the layout of their further dimensions."""
    return torch.cat((a, start_a.to(a))), torch.cat((b, -start_b.to(b)), dim=1)


def doubled_alpha(alpha: float, use_rslora: bool) -> float:
    """The lora_alpha that keeps the scaling when the rank doubles."""
    return alpha * (math.sqrt(2) if use_rslora else 2)
