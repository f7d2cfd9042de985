"""Positions behind a prefix: what counts positions in a model, and shifting it by the number of virtual tokens."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .prompts import Prompts

_TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")


def position_modules(stack: nn.Module) -> dict[str, nn.Module]:
    """The modules of a stack that turn position numbers into numbers: tables of embeddings, and rotary embeddings."""
    found = {}
    for name, module in stack.named_modules():
        takes_numbers = "position_ids" in inspect.signature(type(module).forward).parameters
        is_table = name.rsplit(".", 1)[-1] in _TABLES
        is_rotary = "RotaryEmbedding" in type(module).__name__
        if (is_table and type(module) is nn.Embedding) or ((is_table or is_rotary) and takes_numbers):
            found[name] = module
    return found


def has_relative_bias(stack: nn.Module) -> bool:
    """Whether positions enter through biases between queries and keys, as in T5."""
    return any(hasattr(m, "relative_attention_bias") for m in stack.modules())


def longest_input(modules: dict[str, nn.Module]) -> int | None:
    """Number of positions in the smallest table of position embeddings, or ``None`` where there is no table."""
    sizes = [
        m.num_embeddings - getattr(m, "offset", 0) - (0 if m.padding_idx is None else m.padding_idx + 1)
        for m in modules.values()
        if isinstance(m, nn.Embedding)
    ]
    return min(sizes, default=None)


def known_positions(modules: dict[str, nn.Module], config: Any) -> int | None:
    """Number of positions that a model was made for: those of its tables, or what its configuration says of rotary embeddings.

    Args:
        modules: What :func:`position_modules` found.
        config: The model's configuration.
    """
    table = longest_input(modules)
    if table is not None or not modules:
        return table
    said = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


class Shift:
    """A forward pre-hook that adds the number of virtual tokens to the positions that a module gets.

    Args:
        holder: What holds the prefixes.
        module: The module that it hangs on.
        stack: The stack whose positions it counts.
    """

    def __init__(self, holder: Prompts, module: nn.Module, stack: str) -> None:
        self.holder, self.stack = holder, stack
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        plain = type(module) is nn.Embedding
        self.place = 0 if plain else self.names.index("position_ids")
        self.name = self.names[self.place]
        self.rows = None if plain or self.place == 0 else 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.holder.longest_shift(self.stack):
            return None
        by_place = len(args) > self.place
        positions = args[self.place] if by_place else kwargs.get(self.name)
        if positions is None:
            positions = self._counted(module, {**dict(zip(self.names, args, strict=False)), **kwargs})
        if positions is None:
            raise ValueError(
                f"A {type(module).__name__} was called without position numbers, so that a prefix cannot shift them."
            )
        rows = positions.shape[0] if positions.dim() > 1 else 1
        if self.rows is not None and len(args) > self.rows and isinstance(args[self.rows], torch.Tensor):
            rows = max(rows, args[self.rows].shape[0])
        shift = self.holder.shift(self.stack, rows, positions.device)
        if isinstance(module, nn.Embedding):
            self._check(module, positions, self.holder.longest_shift(self.stack))
        shifted = positions + shift
        if by_place:
            return (*args[: self.place], shifted, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: shifted}

    def _counted(self, module: Any, call: dict[str, Any]) -> torch.Tensor | None:
        """The positions that a table counts itself, from the shape of the input and the length of the cache."""
        given, past = call.get(self.names[0]), call.get("past_key_values_length", 0)
        shape: Any = given if isinstance(given, torch.Size) else getattr(given, "shape", ())
        if not isinstance(module, nn.Embedding) or len(shape) < 2:
            return None
        return torch.arange(past, past + shape[1], device=module.weight.device)

    def as_rows(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take the dimension out again that some tables put in front of positions, where these differ from row to row."""
        is_wide = isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[0] == 1
        return output[0] if is_wide and self.holder.plan() is not None else None

    @staticmethod
    def _check(module: nn.Embedding, positions: torch.Tensor, shift: int) -> None:
        tokens, room = positions.shape[-1], module.num_embeddings - getattr(module, "offset", 0)
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            # Generation with a cache gives one token at a time. Elsewhere than on a CPU reading the number would wait for the device.
            tokens = max(tokens, int(positions.max()) + 1)
        if tokens + shift > room:
            raise ValueError(
                f"The input has {tokens} tokens and the adapter {shift} virtual ones, but the model has only {room} positions. "
                f"Truncate the input to {room - shift} tokens, generate fewer, or train with fewer virtual tokens."
            )
