"""Dropout whose mask is drawn in wide words and kept as a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LEVELS = 1 << 16
# Odd numbers of 64 bits, as signed ones: the golden ratio, and multipliers of Stafford's mixing functions.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def draw_seed() -> int:
    """A seed from torch's random state, so that ``torch.manual_seed`` and checkpointing govern the masks made from it."""
    return int(torch.randint(0, 2**62, ()).item())


def keep_mask(shape: Sequence[int], device: torch.device, rate: float, seed: int) -> torch.Tensor:
    """Which elements dropout keeps: the same for the same seed, shape, rate and type of device.

    On a CPU every element is decided by 16 bits of its own, of which four are drawn at once as one 64-bit word: many times
    cheaper than a random float for each element. The rate is thereby rounded to a multiple of 2**-16, and elsewhere likewise.

    Args:
        shape: Shape of the tensor to be dropped out.
        device: Its device.
        rate: Probability that an element is dropped, 0 to 1.
        seed: As :func:`draw_seed` gives it.

    Returns:
        An int8 tensor, 1 where an element is kept and 0 where it is dropped. (Multiplying by int8 is faster than by bool.)
    """
    count = math.prod(shape)
    dropped = round(rate * _LEVELS)
    if dropped in (0, _LEVELS):  # the numbers below would leave 16 bits
        return torch.full(tuple(shape), int(dropped == 0), dtype=torch.int8, device=device)
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(tuple(shape), dtype=torch.int8, device=device).bernoulli_(
            kept_share(rate), generator=generator
        )
    # The lowest number that is kept, and the one below it: clamping between them is many times faster than a comparison.
    lowest = dropped - _LEVELS // 2
    lanes = _words((count + 3) // 4, seed).view(torch.int16)
    return lanes[:count].clamp_(lowest - 1, lowest).sub_(lowest - 1).to(torch.int8).view(tuple(shape))


def _words(count: int, seed: int) -> torch.Tensor:
    """Random 64-bit words, (count,)."""
    # torch's generator draws one number after the other. A counter that is mixed until no bit tells it any more (SplitMix64,
    # Steele et al. 2014) is drawn in parallel. Shifts copy the sign here, so that the last step has to be a product.
    words = torch.arange(count, dtype=torch.int64).mul_(_STEP).add_(seed * 2 - 2**63)
    for factor in (_FIRST, _SECOND):
        words.bitwise_xor_(words >> 30).mul_(factor)
    return words


def kept_share(rate: float) -> float:
    """The probability with which :func:`keep_mask` keeps an element: ``1 - rate``, rounded as it is rounded there."""
    return 1 - round(rate * _LEVELS) / _LEVELS
