"""Prefix tuning: trained keys and values in front of those of every attention layer (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftType, PromptLearningConfig
from ..core.prompt_tuner import Geometry, PrefixTuner, as_table
from ..core.prompts import Prompts, PromptTable
from ..core.tokens import real_tokens


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning.

    Args:
        init_weights: ``"zero"``: start from keys and values of zero, instead of ``prefix_init``.
        encoder_hidden_size: Width of the hidden layer that makes the prefix, with ``prefix_projection``; the size of a token's keys
            when not given.
        prefix_projection: Make the prefix by a network of one hidden layer while it trains, instead of training it directly.
        prefix_init: ``"tokens"``: start from the keys and values that the base model gives real tokens, with a projection whose last
            layer is zero; ``"peer"``: start at random. Only training reads it, and it is not saved.

    Raises:
        ValueError: Unknown ``prefix_init`` or ``init_weights``.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    prefix_init: str = field(default="tokens", kw_only=True)

    _transient_keys = (*PromptLearningConfig._transient_keys, "prefix_init")

    def __post_init__(self) -> None:
        self.peft_type = PeftType.PREFIX_TUNING
        super().__post_init__()
        if self.prefix_init not in ("tokens", "peer"):
            raise ValueError(f"`prefix_init` should be 'tokens' or 'peer', got {self.prefix_init!r}.")
        if self.init_weights not in ("zero", None):
            raise ValueError(f"`init_weights` should be 'zero' or None, got {self.init_weights!r}.")


class PrefixEncoder(PromptTable):
    """What makes a prefix from smaller parameters: P = S + W₂ tanh(W₁ E + b₁) + b₂ (section 4.3, with a fixed start S).

    Args:
        config: The adapter's configuration, its sizes filled in. E has a row of ``token_dim`` numbers for each virtual token, the
            hidden layer ``encoder_hidden_size``.
    """

    folded = False

    def __init__(self, config: Any) -> None:
        super().__init__(config.num_virtual_tokens, config.token_dim)
        hidden, columns = config.encoder_hidden_size, config.num_layers * 2 * config.token_dim
        self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, columns))
        self.start: torch.Tensor | None
        has_start = config.prefix_init == "tokens" and config.init_weights is None
        self.register_buffer("start", torch.zeros(config.num_virtual_tokens, columns) if has_start else None)

    def forward(self) -> torch.Tensor:
        table = self.transform(self.embedding.weight)
        return table if self.start is None else self.start + table

    def expect(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if "start" not in tensors:
            self.start = None
        elif self.start is None:
            self.start = torch.zeros_like(tensors["start"], device=self.embedding.weight.device)

    def columns(self, start: int, stop: int) -> torch.Tensor:
        last: Any = self.transform[2]
        hidden = self.transform[1](self.transform[0](self.embedding.weight))
        part = nn.functional.linear(hidden, last.weight[start:stop], last.bias[start:stop])
        return part if self.start is None else self.start[:, start:stop] + part


class PrefixTuningModel(PrefixTuner):
    """A base model with prefixes; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        values = super().fill(config, geometry)
        return {**values, "encoder_hidden_size": config.encoder_hidden_size or geometry.key_size}

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        if config.prefix_projection:
            return PrefixEncoder(config)
        return super().make_table(config, geometry, model)

    @classmethod
    def start(cls, table: PromptTable, config: Any, holder: Prompts, model: nn.Module) -> None:
        if config.init_weights is None and config.prefix_init == "peer":
            return
        if isinstance(table, PrefixEncoder):
            last: Any = table.transform[2]
            last.weight.zero_()
            last.bias.zero_()
        else:
            table.embedding.weight.zero_()
        if config.init_weights is None:
            # The base model's own keys and values: a prefix that every layer already knows how to read.
            pairs = holder.keys_values_of(real_tokens(model, config.num_virtual_tokens))
            flat = as_table(pairs, table.stride)
            (table.embedding.weight if table.folded else table.start).copy_(flat)
