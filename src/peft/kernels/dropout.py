"""Dropout whose mask is drawn in wide words and kept as a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LEVELS = 1 << 16


def draw_seed() -> int:
    """A seed from torch's random state, so that ``torch.manual_seed`` and checkpointing govern the masks made from it."""
    return int(torch.randint(0, 2**62, ()).item())


def keep_mask(shape: Sequence[int], device: torch.device, rate: float, seed: int) -> torch.Tensor:
    """Which elements dropout keeps: the same for the same seed, shape, rate and type of device.

    Every element is decided by 16 bits of its own, of which four are drawn at once as one 64-bit word: many times
    cheaper than a random float for each element. The rate is thereby rounded to a multiple of 2**-16.

    Args:
        shape: Shape of the tensor to be dropped out.
        device: Its device.
        rate: Probability that an element is dropped, 0 to 1.
        seed: As :func:`draw_seed` gives it.

    Returns:
        An int8 tensor, 1 where an element is kept and 0 where it is dropped. (Multiplying by int8 is faster than by bool.)
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    keep = words.view(torch.int16)[:count] >= round(rate * _LEVELS) - _LEVELS // 2
    return keep.view(torch.int8).view(shape)


def kept_share(rate: float) -> float:
    """The probability with which :func:`keep_mask` keeps an element: ``1 - rate``, rounded as it is rounded there."""
    return 1 - round(rate * _LEVELS) / _LEVELS
