"""Prefix tuning: trained keys and values in front of those of every attention layer (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftType, PromptLearningConfig
from ..core.prompt_table import MAIN, PrefixNetwork, PromptTable, Where
from ..core.prompt_tuner import Geometry, PrefixTuner, check_part
from ..core.prompts import Prompts


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


class PrefixEncoder(PrefixNetwork):
    """What makes a prefix from smaller parameters: P = S + W₂ tanh(W₁ E + b₁) + b₂ (section 4.3, with a fixed start S).

    Args:
        config: The adapter's configuration, its sizes filled in. E has a row of ``token_dim`` numbers for each virtual token, the
            hidden layer ``encoder_hidden_size``.
    """

    def __init__(self, config: Any) -> None:
        has_start = config.prefix_init == "tokens" and config.init_weights is None
        size, hidden = config.token_dim, config.encoder_hidden_size
        super().__init__(config.num_virtual_tokens, size, hidden, config.num_layers, 2 * size, has_start)


class PrefixTuningModel(PrefixTuner):
    """A base model with prefixes; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        check_part(geometry, MAIN)
        values = super().fill(config, geometry)
        return {**values, "encoder_hidden_size": config.encoder_hidden_size or geometry.key_size}

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        if config.prefix_projection:
            return PrefixEncoder(config)
        return super().make_table(config, geometry, model)

    @classmethod
    def start(cls, table: PromptTable, config: Any, holder: Prompts, model: nn.Module) -> None:
        if config.init_weights is not None:
            assert table.layout is not None
            table.begin([torch.zeros(n, 2 * config.token_dim) for n in table.layout.lengths])
        elif config.prefix_init == "tokens":
            super().start(table, config, holder, model)

    @classmethod
    def pack(cls, pieces: Mapping[Where, torch.Tensor], values: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        layers, stride = values["num_layers"], values["num_transformer_submodules"]
        elsewhere = sorted({part for part, _ in pieces if part != MAIN})
        missing = [i for i in range(layers) if (MAIN, i) not in pieces]
        lengths = {len(piece) for piece in pieces.values()}
        reason = None
        if elsewhere:
            reason = (
                f"it has virtual tokens in other places ({', '.join(elsewhere)}) than the self-attention of one stack"
            )
        elif missing:
            reason = f"layers {missing} have no virtual tokens, and prefix tuning puts some in front of every layer"
        elif len(lengths) > 1:
            reason = f"layers have different numbers of virtual tokens ({sorted(lengths)}), and prefix tuning has one for all"
        places: dict[int, torch.Tensor] = {}
        for i in range(layers if reason is None else 0):
            piece, place = pieces[MAIN, i], stride * i % layers
            if place in places and not torch.equal(places[place], piece):
                twin = next(j for j in range(i) if stride * j % layers == place)
                reason = (
                    f"files of prefix tuning let layers {twin} and {i} of an encoder-decoder with {layers} layers share their prefix, "
                    "and here they have different ones"
                )
            places[place] = piece
        if reason is not None:
            raise ValueError(f"The adapter cannot be written as prefix tuning: {reason}. Keep it as it is.")
        count = lengths.pop()
        empty = torch.zeros_like(pieces[MAIN, 0])  # places that no layer reads
        return {**values, "num_virtual_tokens": count}, torch.cat([places.get(i, empty) for i in range(layers)], 1)
