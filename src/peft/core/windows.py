"""Sliding windows: how long virtual tokens of the input stay in sight of the tokens behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .mixed import Names, by_rows
from .prompt_table import ACTIVE, MAIN

if TYPE_CHECKING:
    from .prefixes import Site
    from .prompts import Prompts


class Clock:
    """Where the queries of a running forward pass stand.

    Args:
        positions: Their positions, (batch or 1, queries): counted from the first real token, or, where virtual tokens are among the
            queries, from the first of these. ``None``: those of transformers' own masks.
        end: A position that none of them reaches, if known.
    """

    def __init__(self, positions: torch.Tensor | None = None, end: int | None = None) -> None:
        self.positions, self.end = positions, end
        self.made: dict[Any, Any] = {}
        """What layers with windows of one length share."""

    def stays_within(self, window: int) -> bool:
        """Whether all positions are known to be smaller than a number."""
        return self.end is not None and self.end <= window


def within_window(positions: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """Which of the tokens 0 … count − 1 queries see: those at their place or before, and less than ``window`` away.

    Args:
        positions: Positions of the queries, (batch or 1, queries), on the same count as the tokens.
        count: Number of tokens.
        window: Length of the window.

    Returns:
        (batch or 1, queries, count), boolean.
    """
    distance = positions[..., None] - torch.arange(count, device=positions.device)
    return (distance >= 0) & (distance < window)


def visible_within(site: Site, window: int | None, key: torch.Tensor) -> torch.Tensor | None:
    """Which prefix columns each query sees, (batch or 1, 1, queries, length); or each row, as ``Prompts.visible`` says.

    Virtual tokens of the input leave a sliding window as real ones do; prefixes stay.

    Args:
        site: The layer.
        window: The length of its window, or ``None``.
        key: Its keys.
    """
    holder, clock = site.holder, site.holder.clock
    most = max(holder._captured_length(names) for names in holder._kinds()) if site.part == MAIN else 0
    if window is None or most == 0 or clock.positions is None or clock.stays_within(window - most):
        return holder.visible(site, key)
    lengths = tuple(holder._length(site, names) for names in holder._kinds())
    if (window, lengths) not in clock.made:
        plan, longest = holder.plan(), max(lengths)
        positions = clock.positions if plan is None else clock.positions.expand(key.shape[0], -1)

        def seen(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            count = holder._captured_length(names)
            own = holder._length(site, names) - count
            here = positions if rows is None else positions.index_select(0, rows)
            near = within_window(here + count, count, window)
            return F.pad(F.pad(near, (own, 0), value=True), (0, longest - own - count), value=False)

        clock.made[window, lengths] = seen(ACTIVE, None) if plan is None else by_rows(plan, key, "a prefix", seen)
    return clock.made[window, lengths][:, None]


def check_flash_window(site: Site, window: int | None, keys: int) -> None:
    """Refuse a prefix that a flash kernel, which takes no mask, would drop out of its window, while with other kernels it stays.

    Args:
        site: The layer.
        window: The length of its window, or ``None``.
        keys: Number of keys, prefix included.

    Raises:
        NotImplementedError: With the mend.
    """
    holder = site.holder
    own = any(
        holder._length(site, n) > (holder._captured_length(n) if site.part == MAIN else 0) for n in holder._kinds()
    )
    if window is not None and keys > window and own:
        raise NotImplementedError(
            f"With flash attention a prefix cannot stay in sight of {keys} keys, prefix included, in a layer with a sliding window of "
            f"{window}. Load the model with attn_implementation='sdpa' or 'eager', or use shorter inputs."
        )


def windowed_mask(holder: Prompts, window: int | None, mask: Any) -> Any:
    """The mask of a layer with a sliding window, where virtual tokens at the input are as far away as positions say.

    transformers counts the padding between them and a row's first token too, and so does training.

    Args:
        holder: What holds the virtual tokens.
        window: The length of the window, or ``None``.
        mask: (batch, 1, queries, keys), boolean or additive.
    """
    clock = holder.clock
    if window is None or clock.positions is None or holder.prepended is None:
        return mask
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return mask
    known = clock.made.get(window)
    if known is None or known[0] is not mask:
        rows, longest = clock.positions.shape[0], holder.longest_tokens()
        front = within_window(clock.positions, longest, window)[:, None]
        if mask.dtype != torch.bool:
            front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(~front, torch.finfo(mask.dtype).min)
        mine, rest = mask.expand(rows, *mask.shape[1:]).split([longest, mask.shape[-1] - longest], dim=-1)
        if holder.plan() is not None:  # rows with fewer virtual tokens have real ones there
            count = holder._of_rows(holder.token_count, rows, mask.device)
            front = torch.where((torch.arange(longest, device=mask.device) < count)[:, None, None], front, mine)
        known = clock.made[window] = mask, torch.cat([front, rest], dim=-1)
    return known[1]
