"""Dropout whose mask is drawn in wide words and kept as a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .workspace import flat_workspace

_LEVELS = 1 << 16
_SLOT = 3
_MOST_KNOWN = 1 << 21
_known = torch.empty(0, dtype=torch.int64)
# Odd numbers of 64 bits, as signed ones: the golden ratio, and multipliers of Stafford's mixing functions.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def draw_seed() -> int:
    """A seed from torch's random state, so that ``torch.manual_seed`` and checkpointing govern the masks made from it."""
    return int(torch.randint(0, 2**62, ()).item())


def keep_mask(
    shape: Sequence[int], device: torch.device, rate: float, seed: int, dtype: torch.dtype = torch.int8
) -> torch.Tensor:
    """Which elements dropout keeps: the same for the same seed, shape, rate and type of device.

    On a CPU every element is decided by 16 bits of its own, of which four are drawn at once as one 64-bit word: many times
    cheaper than a random float for each element. The rate is thereby rounded to a multiple of 2**-16, and elsewhere likewise.

    Args:
        shape: Shape of the tensor to be dropped out.
        device: Its device.
        rate: Probability that an element is dropped, 0 to 1.
        seed: As :func:`draw_seed` gives it.
        dtype: Of the mask on a CPU: that of what it is multiplied by spares a conversion. Elsewhere it is int8, for its size.

    Returns:
        A tensor, 1 where an element is kept and 0 where it is dropped; outside a graph in the kernels' workspace, valid until the next
        mask is made in the same thread.
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
    lanes = lanes[:count].clamp_(lowest - 1, lowest).sub_(lowest - 1)
    mask = flat_workspace(_SLOT, count, dtype)
    return (lanes.to(dtype) if mask is None else mask.copy_(lanes)).view(tuple(shape))


def drop(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Dropout of ``x`` by operations that autograd, or a compiler, looks into; kept elements are scaled up.

    Compiled for a CPU, the random floats of ``F.dropout`` are drawn one after the other and take several times as long as all the
    rest of a low-rank product. There the mask is made as :func:`keep_mask` makes it.

    Args:
        x: Any shape.
        rate: Probability that an element is dropped, 0 to 1.
    """
    dropped, count = round(rate * _LEVELS), x.numel()
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or dropped in (0, _LEVELS):
        return F.dropout(x, rate)
    words = torch.arange((count + 3) // 4, dtype=torch.int64) * _STEP + torch.randint(-(2**62), 2**62, ())
    for factor in (_FIRST, _SECOND):
        words = (words ^ (words >> 30)) * factor
    lanes = words.view(torch.int16)[:count].view(x.shape)
    return x * (lanes >= dropped - _LEVELS // 2).to(x.dtype) / kept_share(rate)


def _words(count: int, seed: int) -> torch.Tensor:
    """Random 64-bit words, (count,)."""
    # torch's generator draws one number after the other. A counter that is mixed until no bit tells it any more (SplitMix64,
    # Steele et al. 2014) is drawn in parallel. Shifts copy the sign here, so that the last step has to be a product.
    words = torch.add(_multiples(count), seed * 2 - 2**63, out=flat_workspace(_SLOT, count, torch.int64))
    for factor in (_FIRST, _SECOND):
        words.bitwise_xor_(
            torch.bitwise_right_shift(words, 30, out=flat_workspace(_SLOT + 1, count, torch.int64))
        ).mul_(factor)
    return words


def _multiples(count: int) -> torch.Tensor:
    """0, 1, 2, … times :data:`_STEP`, (count,); what was made once is kept, since it is the same in every mask."""
    global _known
    if count <= _known.numel():
        return _known[:count]
    with torch.inference_mode(False):  # an inference tensor could not be used in a graph later
        made = torch.arange(count, dtype=torch.int64).mul_(_STEP)
    if count <= _MOST_KNOWN and not torch._C._len_torch_dispatch_stack():
        _known = made
    return made


def kept_share(rate: float) -> float:
    """The probability with which :func:`keep_mask` keeps an element: ``1 - rate``, rounded as it is rounded there."""
    return 1 - round(rate * _LEVELS) / _LEVELS
