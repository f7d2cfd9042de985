"""Prefixes: keys and values that stand in front of those of the attention layers, without touching caches or model code.

transformers looks up the function that computes attention by a name in the configuration. Each attention layer gets a view of
its configuration that names :func:`attention_with_prefix`, which prepends the prefix and calls the real function. It does so
after rotary positions and the cache, so a prefix never enters a cache and needs nothing from beams or static caches.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.prefixed_attention import ends_at_prefix, prefixed_attention, takes_groups
from .prompt_table import MAIN, Where, stack_of, turn
from .windows import check_flash_window, visible_within, windowed_mask

if TYPE_CHECKING:
    from .prompts import Prompts

NAME = "peft_prefix"
"""The name in transformers' table of attention functions."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, each (heads, length, head size)."""


# -- places ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Site:
    """One attention layer that takes prefixes.

    Args:
        module: The attention layer.
        holder: What holds the prefixes.
        index: Its number among the layers of its part.
        eager: The model's own plain attention function; ``None`` for a layer that looks none up.
        config: The layer's configuration.
        bias_owner: In models with relative position biases, the layer that makes them.
        part: Which part of the model it is of.
        past: In such models, the number of cached tokens of the current call.
    """

    module: nn.Module
    holder: Prompts
    index: int
    eager: Callable[..., Any] | None
    config: Any
    bias_owner: Any = None
    part: str = MAIN
    past: Any = 0

    def __post_init__(self) -> None:
        self.where: Where = (self.part, self.index)
        """What names it in a layout."""
        self.stack = stack_of(self.part)
        """The stack that runs it."""
        self.order = turn(self.where)
        """Its turn in its stack."""

    def attend(self) -> Callable[..., Any]:
        """The function that the model would have used."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = self.config._attn_implementation
        if name is None or name == "eager":
            assert self.eager is not None
            return self.eager
        if name.startswith(("paged", "flex")):
            raise NotImplementedError(
                f"Prefixes do not work with the attention implementation {name!r}. Use 'sdpa', 'eager' or flash attention."
            )
        return ALL_ATTENTION_FUNCTIONS[name]


def attention_layers(stack: nn.Module, *, cross: bool = False) -> list[tuple[nn.Module, Callable[..., Any] | None]]:
    """Attention layers of a stack that take prefixes.

    Args:
        stack: The stack.
        cross: Those that attend to an encoder, instead of to the stack itself.

    Returns:
        Each layer that looks up its attention function, with the model's plain one; or with ``None``, each that asks a cache.
    """
    found: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    from .alibi import attends_through_cache

    for name, module in stack.named_modules():
        if not cross and hasattr(stack, "build_alibi_tensor") and attends_through_cache(module):
            found.append((module, None))
            continue
        forward = inspect.unwrap(type(module).forward)
        code, variables = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names or _is_cross(name, module) != cross:
            continue
        if hasattr(module, "config") and "eager_attention_forward" in variables:
            found.append((module, variables["eager_attention_forward"]))
    return found


def _is_cross(name: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    return re.search("cross|encoder_?attn|encdec", name.lower() + type(module).__name__.lower()) is not None


def key_value_shape(module: nn.Module) -> tuple[int, int]:
    """Number of key heads of an attention layer, and their size.

    Raises:
        NotImplementedError: The layer does not say them.
    """
    config: Any = getattr(module, "config", None)

    def first(*names: str) -> int | None:
        for owner in (module, config):
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return None

    queries = first("num_attention_heads", "num_heads", "n_heads", "n_head")
    heads = first("num_key_value_heads") or queries
    size = first("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    if size is None and queries and (hidden := first("hidden_size", "dim", "embed_dim", "d_model")):
        size = hidden // queries
    if heads is None or size is None:
        raise NotImplementedError(f"Cannot tell the number and size of the heads of a {type(module).__name__}.")
    return heads, size


def divert(site: Site) -> None:
    """Let an attention layer call :func:`attention_with_prefix`."""
    site.module.config = _view(site.config)  # type: ignore[assignment]
    site.module._peft_site = site  # type: ignore[assignment]


def restore(site: Site) -> None:
    """Undo :func:`divert`."""
    site.module.config = site.config
    del site.module._peft_site


_VIEWS: dict[type, type] = {}


def _view(config: Any) -> Any:
    """The configuration itself under another class, whose attention function is ours; both share one dictionary of values."""
    kind: Any = type(config)
    if kind not in _VIEWS:

        def implementation(self: Any) -> str:
            return NAME

        def reduce(self: Any, protocol: int = 2) -> tuple[Any, ...]:
            return _view, (self._peft_original,)

        members: dict[str, Any] = {
            "__slots__": ("_peft_original",),
            "__module__": kind.__module__,
            "_attn_implementation": property(implementation),
            "__reduce_ex__": reduce,
        }
        _VIEWS[kind] = type(kind)(kind.__name__, (kind,), members)
        register()
    view: Any = object.__new__(_VIEWS[kind])
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_peft_original", config)
    return view


class NotePast:
    """A forward pre-hook that tells a site how many tokens the cache holds, which relative position biases depend on."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        self.site.past = past.clone() if isinstance(past, torch.Tensor) else past


# -- attention -------------------------------------------------------------------------------------------------------


def attention_with_prefix(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """Attention over prefix and tokens: softmax(q [Kₚ; K]ᵀ / √d) [Vₚ; V] (Li & Liang 2021, arXiv 2101.00190).

    Args:
        module: The attention layer.
        query: (batch, query heads, queries, head size).
        key: (batch, key heads, keys, head size), rotated, cached tokens included.
        value: The same shape.
        attention_mask: ``None``, (batch, 1, queries, keys), boolean or additive, or (batch, keys) for flash attention.
        **kwargs: For the real function.
    """
    site: Site = module._peft_site
    site.holder.note(site, key, value)
    attend = site.attend()
    window = kwargs.get("sliding_window")
    attention_mask = windowed_mask(site.holder, window, attention_mask)
    prefix = site.holder.prefix(site, key)
    if prefix is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    prefix_key, prefix_value, visible = prefix
    queries, length = query.shape[2], prefix_key.shape[2]
    is_causal = kwargs.get("is_causal")
    if is_causal is None:  # what transformers' functions take a missing mask to mean
        is_causal = getattr(module, "is_causal", site.config._attn_implementation not in (None, "eager"))
    if attention_mask is None and is_causal and queries > 1 and key.shape[2] > queries:
        # An empty static cache: what lies behind the queries is not filled yet.
        key, value = key[:, :, :queries], value[:, :, :queries]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., :queries]
    keys = key.shape[2]
    kernel = site.config._attn_implementation or "eager"
    if not kernel.startswith("flash"):
        visible = visible_within(site, window, key)
    is_plain = _is_plain(attend, query, attention_mask, kwargs)
    alone = is_plain and visible is None and prefix_key.shape[0] == 1 and ends_at_prefix(query, key, value, *prefix[:2])
    with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
        key, value = in_front(prefix_key, key), in_front(prefix_value, value)
    if kwargs.get("position_bias") is not None:
        bias = site.holder.by_length(site, lambda n: _pad_columns(_prefix_bias(site, queries, n, query), length), query)
        rest = kwargs["position_bias"].expand(bias.shape[0], -1, -1, -1)
        kwargs["position_bias"] = torch.cat([bias.to(query.dtype).expand(rest.shape[0], -1, -1, -1), rest], dim=-1)
    if kernel.startswith("flash"):
        # It counts the window itself, from the last key, and with it what stands before the tokens.
        check_flash_window(site, window, keys + length)
    if attention_mask is not None:
        mask = _padded_mask(attention_mask, length, visible, query, kwargs.get("position_bias") is None)
    elif visible is None and kernel.startswith("flash"):
        mask = None  # aligned at the bottom right: the prefix is seen as it should
    elif visible is None and kernel == "sdpa" and is_causal and queries > 1 and _spares_mask(module, query, kwargs):
        # As many queries of no use in front make the kernel's own causal mask fit.
        output, weights = attend(module, F.pad(query, (0, 0, length, 0)), key, value, None, **kwargs)
        return output[:, length:], weights
    else:
        mask = _shared_mask(site, queries, keys, length, bool(is_causal), visible, query)
    scale = kwargs.get("scaling")
    if alone:
        return prefixed_attention(query, key, value, prefix_key[0], prefix_value[0], mask, scale), None
    if mask is not None and queries > 1 and query.shape[1] != key.shape[1] and is_plain and takes_groups():
        # transformers would repeat keys and values where there is a mask.
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    return attend(module, query, key, value, mask, **kwargs)


def mask_for(
    site: Site, mask: Any, length: int, shape: tuple[int, int], like: torch.Tensor, *, is_causal: bool
) -> torch.Tensor | None:
    """The mask of a layer that adds it to its scores, with columns for the prefix.

    Args:
        site: The layer.
        mask: Its mask without a prefix, or ``None``.
        length: Number of columns in front.
        shape: Numbers of queries and keys.
        like: A tensor of the layer's dtype and batch.
        is_causal: Whether a query sees earlier keys alone.
    """
    visible = site.holder.visible(site, like)
    if mask is None:
        return _shared_mask(site, *shape, length, is_causal, visible, like)
    return _padded_mask(mask, length, visible, like, True)


def _shared_mask(
    site: Site, queries: int, keys: int, length: int, is_causal: bool, visible: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor | None:
    causal = is_causal and queries > 1
    if torch.compiler.is_compiling():
        return _fresh_mask(queries, keys, length, causal, visible, query)
    return site.holder.shared(
        site,
        (queries, keys, length, causal, visible, query.dtype, query.device, torch.is_inference_mode_enabled()),
        lambda: _fresh_mask(queries, keys, length, causal, visible, query),
    )


def in_front(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A prefix, (batch or 1, heads, length, size), before a layer's own keys or values, (batch, heads, keys, size)."""
    return torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], dim=2)


def _spares_mask(module: Any, query: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a mask costs more than queries of no use: on a GPU it rules out flash kernels, and grouped keys have to be repeated."""
    grouped = getattr(module, "num_key_value_groups", 1) > 1
    if grouped and query.device.type == "cuda" and query.dtype == torch.float32:
        # Without a mask grouped keys are not repeated, and for fp32 no kernel takes them but the plain one.
        return False
    return query.device.type != "cpu" and kwargs.get("position_bias") is None


def _is_plain(attend: Callable[..., Any], query: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers would do no more than call torch's kernel for the CPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return (
        attend is sdpa_attention_forward
        and query.device.type == "cpu"
        and not getattr(mask, "requires_grad", False)
        and not any(kwargs.get(name) for name in ("dropout", "softcap", "output_attentions"))
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
    )


def _prefix_bias(site: Site, queries: int, length: int, query: torch.Tensor) -> torch.Tensor:
    """Relative position biases between the queries and ``length`` tokens before the first, (1, heads, queries, length).

    Attention to an encoder knows no positions.
    """
    if site.bias_owner is None:
        return query.new_zeros(1, query.shape[1], queries, length)
    return site.bias_owner.compute_bias(queries, length, device=query.device, past_seen_tokens=site.past + length)


def _pad_columns(bias: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(bias, (0, length - bias.shape[-1]))


def _fresh_mask(
    queries: int, keys: int, length: int, is_causal: bool, visible: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor | None:
    """The additive mask for a call that needs none without a prefix; ``None`` where it needs none with it either."""
    if not is_causal and visible is None:
        return None
    lowest = torch.finfo(query.dtype).min
    mask = query.new_zeros(queries, length + keys)
    if is_causal:  # the kernels' own causal masks align the first query with the first key, which is the prefix's
        column = torch.arange(length + keys, device=query.device)
        row = torch.arange(queries, device=query.device)[:, None] + length
        mask = mask.masked_fill(column > row, lowest)
    mask = mask[None, None]
    if visible is not None:
        mask = mask.masked_fill(F.pad(~_by_query(visible), (0, keys), value=False), lowest)
    return mask


_PADDED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Masks with columns for a prefix, by the mask without: all layers of a forward pass share one mask, and so one copy."""


def _padded_mask(
    mask: Any, length: int, visible: torch.Tensor | None, query: torch.Tensor, additive: bool
) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor):
        raise NotImplementedError(f"Prefixes do not work with an attention mask of type {type(mask).__name__}.")
    if torch.compiler.is_compiling():
        return _pad_mask(mask, length, visible, query, additive)
    known = _PADDED.setdefault(mask, {})
    state = (visible is not None and visible.data_ptr(), query.dtype, additive, version(mask))
    if length not in known or known[length][0] != state:
        # The second element keeps `visible` alive, so that its address stays its own.
        known[length] = (state, visible, _pad_mask(mask, length, visible, query, additive))
    return known[length][2]


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def _pad_mask(
    mask: torch.Tensor, length: int, visible: torch.Tensor | None, query: torch.Tensor, additive: bool
) -> torch.Tensor:
    """A mask with ``length`` columns in front."""
    if mask.dim() == 2:  # flash attention: (batch, keys)
        front = mask.new_ones(mask.shape[0], length) if visible is None else visible.to(mask.dtype)
        return torch.cat([front, mask], dim=1)
    if mask.dtype == torch.bool and additive:  # as the kernels do inside, but for each layer anew
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    front = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    front = front.expand(*mask.shape[:-1], length)
    if visible is not None:
        off: float | bool = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        rows = max(visible.shape[0], mask.shape[0])
        front = front.expand(rows, *mask.shape[1:-1], length).masked_fill(~_by_query(visible), off)
        mask = mask.expand(rows, *mask.shape[1:])
    return torch.cat([front, mask], dim=-1)


def _by_query(visible: torch.Tensor) -> torch.Tensor:
    """What rows see, or each of their queries, as (batch or 1, 1, queries or 1, length)."""
    return visible if visible.dim() == 4 else visible[:, None, None]


def register() -> None:
    """Enter :func:`attention_with_prefix` into transformers' table."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_with_prefix)
