"""Memory that kernels use again and again on the CPU, for results that are dead when the next kernel begins."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

_LARGEST = 1 << 24
"""Bytes. Larger results are allocated as usual: what is kept for good stays small next to a model."""
_buffers = threading.local()


def workspace(slot: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """An uninitialised tensor for ``out=``, in the layout of another one; valid until the next call with this slot in the same thread.

    A new tensor's pages come from the system cold, which on the CPU costs more than the arithmetic on a small matrix.

    Args:
        slot: Which buffer.
        like: A tensor of its shape and device, and dtype if none is given. Where it is a transposed matrix the result is one too:
            products with it are then the same bit for bit.
        dtype: Its dtype.

    Returns:
        The tensor, or ``None`` where a graph is recorded, which would refer to it later.
    """
    if torch.is_grad_enabled():
        return None
    dtype = like.dtype if dtype is None else dtype
    part = flat_workspace(slot, like.numel(), dtype) if like.device.type == "cpu" else None
    if part is None:
        return torch.empty_like(like, dtype=dtype)
    return part.view(like.mT.shape).mT if like.dim() == 2 and like.mT.is_contiguous() else part.view(like.shape)


def flat_workspace(slot: int, size: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The same as a vector on the CPU; ``None`` also where it would be empty, or too large to be kept for good.

    Args:
        slot: Which buffer; there is one for each dtype.
        size: Number of elements.
        dtype: Their type.
    """
    if torch.is_grad_enabled() or not 0 < size * dtype.itemsize <= _LARGEST:
        return None
    if torch._C._len_torch_dispatch_stack():  # tensors made under a mode, such as fake ones, may be its own
        return None
    key = f"{slot} {dtype}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written to later
            buffer = torch.empty(size, dtype=dtype)
        setattr(_buffers, key, buffer)
    return buffer[:size]


def side_by_side(tensors: Sequence[torch.Tensor], slot: int | None) -> torch.Tensor:
    """Tensors of one shape as one, (n, …).

    Args:
        tensors: The tensors.
        slot: Which buffer they are put into; ``None`` for memory of their own.
    """
    first = tensors[0]
    if (
        slot is None
        or first.device.type != "cpu"
        or torch.compiler.is_compiling()
        or len({t.dtype for t in tensors}) > 1
    ):
        return torch.stack(list(tensors))
    part = flat_workspace(slot, len(tensors) * first.numel(), first.dtype)
    return torch.stack(list(tensors), out=None if part is None else part.view(len(tensors), *first.shape))


def widened(x: torch.Tensor, dtype: torch.dtype, slot: int = 0) -> torch.Tensor:
    """A tensor in a wider dtype, in the workspace where it is not in it already: for products that are made of it right away.

    Args:
        x: The tensor.
        dtype: The wider dtype.
        slot: Which buffer.
    """
    if x.dtype == dtype:
        return x
    part = flat_workspace(slot, x.numel(), dtype) if x.device.type == "cpu" else None
    return x.to(dtype) if part is None else part.view(x.shape).copy_(x)
