"""What every kernel asks before it takes its hand-written backward pass: is one wanted, and does autocast change the operands."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

FEW = int(os.environ.get("PEFT_KERNELS_FROM", 2**16))
"""Inputs of fewer elements take the plain operations: what the hand-written form saves is less than what its calls from Python cost."""


def by_hand(x: torch.Tensor, *others: torch.Tensor | None, few: bool = False) -> bool:
    """Whether a hand-written backward pass is wanted: one is needed, and nothing wants to look inside.

    Args:
        x: A kernel's input.
        *others: Its other operands.
        few: For inputs of few elements too.
    """
    return _needs_graph(x, *others) and _is_large(x, few) and unobserved()


def no_graph(x: torch.Tensor, *others: torch.Tensor | None, few: bool = False) -> bool:
    """Whether results may be changed in place: no graph is recorded, and nothing wants to look inside; see :func:`by_hand`.

    Small inputs take the plain operations here too: then what is computed is the same bit for bit, with a graph and without.
    """
    return not _needs_graph(x, *others) and _is_large(x, few) and unobserved()


def _needs_graph(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_large(x: torch.Tensor, few: bool) -> bool:
    return x.dim() > 1 and (few or x.numel() >= FEW)


def unobserved() -> bool:
    """Whether operations are simply carried out: not compiled, traced, transformed or differentiated forward."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """The operands in autocast's dtype, where it is on: inside a function it would not see the backward pass."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others)]


_NOTHING = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is off; entering torch's own costs as much as a small product, so only where it is on."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NOTHING
