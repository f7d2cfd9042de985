"""Virtual tokens at the input: prepended to the embeddings, or, where a cache is used, run once and kept as a prefix.

An encoder's virtual tokens see the input, so they have to be a part of it. In a decoder they see only one another: their keys and
values are the same for every input, and a cache need not hold them. Generation therefore runs them once and goes on as with a
prefix, which static caches, beams and rows of unequal length know nothing of.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .mixed import Names, by_rows
from .positions import longest_input, position_modules
from .prompt_table import ACTIVE, MAIN
from .windows import Clock

if TYPE_CHECKING:
    from .prompts import Prompts

WITHIN = "within"
"""Says of a cache that the virtual tokens are in it."""
_MARK = "_peft_virtual_tokens"
"""Attribute of a cache, copied with it: :data:`WITHIN`, or names of adapters and the keys and values of their virtual tokens that
stand before it."""


def hooks(holder: Prompts, model: Any) -> list[Any]:
    """Hang virtual tokens on a model.

    Returns:
        What removes them again.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        stack = model.get_decoder()
        return Prepend(holder, stack, stays=_reads_first_token(model)).hang(stack)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    widen = _WidenMask(holder)
    handles = Prepend(holder, encoder, stays=True).hang(encoder)
    return [*handles, decoder.register_forward_pre_hook(widen, with_kwargs=True)]


def _reads_first_token(model: Any) -> bool:
    """Whether a model's head reads the first position, which then is a virtual token."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        return False
    return getattr(model.config, "classifier_pooling", "cls") == "cls" and not hasattr(model, "score")


class Prepend:
    """The hooks around a stack of layers.

    Args:
        holder: What holds the virtual tokens.
        stack: The stack; its ``forward`` takes ``inputs_embeds``.
        stays: Leave virtual tokens in the output.
    """

    def __init__(self, holder: Prompts, stack: nn.Module, *, stays: bool) -> None:
        self.holder = holder
        self.names = list(inspect.signature(type(stack).forward).parameters)[1:]
        self.stays = stays
        self.room = longest_input(position_modules(stack))
        self.can_cache = holder.is_decoder and "past_key_values" in self.names

    def hang(self, stack: nn.Module) -> list[Any]:
        """Register both hooks."""
        return [
            stack.register_forward_pre_hook(self.before, with_kwargs=True),
            stack.register_forward_hook(self.after, with_kwargs=True),
        ]

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the stack's arguments."""
        holder = self.holder
        if holder.is_capturing:
            return None
        holder.captured, holder.prepended, holder.clock = {}, None, Clock()
        if not holder.token_kinds():
            return None
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
            raise ValueError(
                f"A {type(module).__name__} takes either `input_ids` or `inputs_embeds`; give exactly one."
            )
        cache = call.get("past_key_values")
        filled = cache is not None and bool(cache.get_seq_length() > 0)
        kept = getattr(cache, _MARK, None) if filled else None
        if kept == WITHIN:
            self._behind(call)
        elif self.can_cache and self._wants_prefix(module, call, cache, filled):
            stamp = _stamp(holder)
            holder.captured = kept[1] if kept and kept[0] == stamp else capture(holder, module)
            holder.clock = _clock(call, cache)
            if cache is not None:
                setattr(cache, _MARK, (stamp, holder.captured))
        elif filled:
            raise ValueError(
                f"A {type(module).__name__} cannot go on from a cache that does not hold the virtual tokens. Pass use_cache=False."
            )
        else:
            self._prepend(call)
            if cache is not None:
                setattr(cache, _MARK, WITHIN)
        return (), call

    def _wants_prefix(self, module: Any, call: dict[str, Any], cache: Any, filled: bool) -> bool:
        if filled:
            return True
        if self.holder.whole or torch.is_grad_enabled() or self.holder.rows_differ:
            return False
        use_cache = call.get("use_cache")
        return cache is not None or bool(getattr(module.config, "use_cache", False) if use_cache is None else use_cache)

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Take virtual tokens out of the stack's output, and remember what its cache holds."""
        holder = self.holder
        if holder.is_capturing:
            return None
        cache = output.get("past_key_values") if hasattr(output, "get") else None
        if cache is not None and not hasattr(cache, _MARK):
            if holder.captured:
                setattr(cache, _MARK, (_stamp(holder), holder.captured))
            elif holder.prepended is not None:
                setattr(cache, _MARK, WITHIN)
        length, holder.captured, holder.prepended, holder.clock = holder.prepended, {}, None, Clock()
        if length is None or self.stays or holder.whole:
            return None
        if isinstance(output, tuple):
            return (self._strip(output[0], length), *output[1:])
        output["last_hidden_state"] = self._strip(output["last_hidden_state"], length)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(self._strip(h, length) for h in output["hidden_states"])
        return output

    def _strip(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """The positions of the real tokens, of which there are ``length``."""

        def run(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            start = self.holder.token_count(names)
            return (x if rows is None else x.index_select(0, rows))[:, start : start + length]

        plan = self.holder.plan()
        return x[:, -length:] if plan is None else by_rows(plan, x, "virtual tokens", run)

    # -- prepending ------------------------------------------------------------------------------------------------

    def _prepend(self, call: dict[str, Any]) -> None:
        holder = self.holder
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = holder.embed(call["input_ids"])
        longest = holder.longest_tokens()
        if self.room is not None and embeds.shape[1] + longest > self.room:
            raise ValueError(
                f"The input has {embeds.shape[1]} tokens and the adapter {longest} virtual ones, but the model has only {self.room} "
                f"positions. Truncate the input to {self.room - longest} tokens, or train with fewer virtual tokens."
            )
        call["input_ids"], holder.prepended = None, embeds.shape[1]
        call["inputs_embeds"] = self._join(embeds, lambda n: holder.tokens(n).to(embeds))
        _widen(holder, call, "attention_mask", embeds)
        if call.get("token_type_ids") is not None:
            zeros = call["token_type_ids"].new_zeros
            call["token_type_ids"] = self._join(call["token_type_ids"], lambda n: zeros(holder.token_count(n)))
        if call.get("position_ids") is not None:
            positions = call["position_ids"].expand(embeds.shape[0], -1)

            def moved(names: Names) -> torch.Tensor:
                return torch.arange(holder.token_count(names), device=positions.device)

            call["position_ids"] = self._join(positions, moved, lambda n, rest: rest + holder.token_count(n))
            if not torch.is_grad_enabled():  # a checkpointed layer that runs again would not know it
                holder.clock = Clock(call["position_ids"])
        if call.get("cache_position") is not None:
            call["cache_position"] = None  # made anew from the embeddings

    def _join(
        self,
        rest: torch.Tensor,
        front: Callable[[Names], torch.Tensor],
        change: Callable[[Names, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return join(self.holder, rest, front, change)

    def _behind(self, call: dict[str, Any]) -> None:
        """Continue behind a cache that holds the virtual tokens."""
        holder = self.holder
        mask = call.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            call["attention_mask"] = join(holder, mask, lambda n: mask.new_ones(holder.token_count(n)))
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + holder.longest_tokens()


def join(
    holder: Prompts,
    rest: torch.Tensor,
    front: Callable[[Names], torch.Tensor],
    change: Callable[[Names, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Put something in front of each row along its second dimension; rows with shorter fronts are filled up with zeros at their ends.

    Args:
        holder: What holds the virtual tokens.
        rest: (batch, length, …).
        front: Gives what stands in front of rows that these adapters act on, (virtual tokens, …) or (batch, virtual tokens, …).
        change: Changes the rest of these rows.
    """
    plan = holder.plan()
    longest = holder.longest_tokens()

    def run(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
        part = rest if rows is None else rest.index_select(0, rows)
        first = front(names)
        part = part if change is None else change(names, part)
        first = first if first.dim() == part.dim() else first.expand(part.shape[0], *first.shape)
        pieces = [first, part]
        if first.shape[1] < longest:
            pieces.append(part.new_zeros(part.shape[0], longest - first.shape[1], *part.shape[2:]))
        return torch.cat(pieces, dim=1)

    return run(ACTIVE, None) if plan is None else by_rows(plan, rest, "virtual tokens", run)


def _widen(holder: Prompts, call: dict[str, Any], name: str, embeds: torch.Tensor) -> None:
    """Let a padding mask show the virtual tokens."""
    mask = call.get(name)
    if mask is None:
        plan = holder.plan()
        if plan is None or len({holder.token_count(n) for n in plan.kinds}) == 1:
            return
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            f"With virtual tokens `{name}` has to be a padding mask of shape (batch, length), since they are a part of the input; got "
            f"{tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__}."
        )
    call[name] = join(holder, mask, lambda n: mask.new_ones(holder.token_count(n)))


class _WidenMask:
    """A forward pre-hook of a decoder: its view of the encoder's padding includes the virtual tokens."""

    def __init__(self, holder: Prompts) -> None:
        self.holder = holder

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = kwargs.get("encoder_hidden_states")
        if states is None or not self.holder.token_kinds():
            return None
        length = states.shape[1] - self.holder.longest_tokens()
        call = dict(kwargs)
        mask = call.get("encoder_attention_mask")
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == length):
            _widen(self.holder, call, "encoder_attention_mask", states[:, :length])
        return args, call


def _clock(call: dict[str, Any], cache: Any) -> Clock:
    """Where the real tokens of a call stand, counted from the first."""
    tokens = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
    past = 0 if cache is None else cache.get_seq_length()
    end = past + tokens.shape[1] if isinstance(past, int) else None
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + past
    return Clock(positions if positions.dim() == 2 else positions[0], end)


def _stamp(holder: Prompts) -> list[tuple[Names, list[str]]]:
    """Whose virtual tokens stand in front of a batch."""
    return [(names, holder.token_names(names)) for names in holder.token_kinds()]


def capture(holder: Prompts, stack: nn.Module) -> dict[Names, Any]:
    """Run virtual tokens alone through a decoder.

    Returns:
        Keys and values of each layer by what acts on rows.
    """
    tokens = {names: holder.tokens(names) for names in holder.token_kinds()}
    # A row for each; what fills up the shorter ones stands behind them, where they do not see it.
    embeds = pad_sequence(list(tokens.values()), batch_first=True).to(holder.device_and_dtype()[1])
    holder.is_capturing = True
    try:
        with holder.only(list(tokens)):
            pairs = holder.record(functools.partial(stack, inputs_embeds=embeds, use_cache=False))
    finally:
        holder.is_capturing = False
    layers = [pairs[MAIN, i] for i in range(len(pairs))]
    return {
        names: [(key[row, :, : len(own)], value[row, :, : len(own)]) for key, value in layers]
        for row, (names, own) in enumerate(tokens.items())
    }


@contextlib.contextmanager
def whole_outputs(holder: Prompts, kwargs: dict[str, Any], labels: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Within this context outputs keep the positions of virtual tokens, and labels get as many that do not count.

    Args:
        holder: What holds the virtual tokens.
        kwargs: Arguments of the model.
        labels: Names of those among them that have a label for each position.
    """
    if holder.is_mixed or not holder.token_kinds():
        yield kwargs
        return
    count = holder.longest_tokens()
    changed = dict(kwargs)
    for name in labels:
        if changed.get(name) is not None:
            changed[name] = torch.nn.functional.pad(changed[name], (count, 0), value=-100)
    before, holder.whole = holder.whole, True
    try:
        yield changed
    finally:
        holder.whole = before
