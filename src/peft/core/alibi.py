"""Prefixes for layers that compute attention themselves from a cache and ALiBi biases, as BLOOM's do.

There is no attention function to replace, but each layer asks its cache for all keys and values. It is handed a view of the cache
that puts the prefix in front of what the cache answers, and leaves the cache as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .prefixes import Site, in_front, mask_for


def attends_through_cache(module: nn.Module) -> bool:
    """Whether a layer takes its cache and its biases as arguments of these names, and no layer inside it does."""
    wanted = {"alibi", "layer_past", "attention_mask"}
    takers = [m for m in module.modules() if wanted <= set(inspect.signature(type(m).forward).parameters)]
    return takers == [module]


class _View:
    """A cache that answers with a prefix in front."""

    def __init__(self, cache: Any, site: Site) -> None:
        self.cache, self.site = cache, site

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        self.site.holder.note(self.site, key, value)
        prefix = self.site.holder.prefix(self.site, key)
        if prefix is None:
            return key, value
        return in_front(prefix[0], key), in_front(prefix[1], value)


class ThroughCache:
    """A forward pre-hook that hands a layer the view, and biases and a mask that are wide enough."""

    def __init__(self, site: Site, stack: Any) -> None:
        self.site, self.stack = site, stack
        self.names = list(inspect.signature(type(site.module).forward).parameters)[1:]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        holder, hidden, alibi = self.site.holder, call["hidden_states"], call["alibi"]
        call["layer_past"] = _View(call.get("layer_past"), self.site)
        length = holder.longest(self.site)
        if length:
            batch, heads = hidden.shape[0], alibi.shape[0] // hidden.shape[0]
            bias = holder.by_length(self.site, lambda n: self._front(n, length, heads, alibi), hidden)
            bias = bias.expand(batch, -1, -1, -1).reshape(batch * heads, 1, length)
            call["alibi"] = torch.cat([bias, alibi], dim=-1)
            shape = (hidden.shape[1], alibi.shape[-1])
            call["attention_mask"] = mask_for(
                self.site, call.get("attention_mask"), length, shape, hidden, is_causal=True
            )
        return (), call

    def _front(self, length: int, longest: int, heads: int, alibi: torch.Tensor) -> torch.Tensor:
        """Biases of ``length`` tokens before the first, (1, heads, 1, longest)."""
        ones = torch.ones(1, length + 1, dtype=torch.long, device=alibi.device)
        made = self.stack.build_alibi_tensor(ones, heads, alibi.dtype)  # (heads, 1, length + 1), rising from 0
        return nn.functional.pad(made[..., :-1] - made[..., -1:], (0, longest - length))[None]
