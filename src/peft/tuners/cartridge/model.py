"""Cartridges: the keys and values of a text, trained to stand for it (Eyuboglu et al. 2025, arXiv 2506.06266)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...config import PeftType, PromptLearningConfig
from ...core.prompt_tuner import Geometry, PrefixTuner
from ...core.prompts import PromptTable
from ...core.sharding import fill


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Configuration of a cartridge.

    Args:
        num_frozen_tokens: How many of the first virtual tokens keep the keys and values that they start from. The first token of a text
            takes up much of the attention of every other, and training is unstable where it changes.

    Raises:
        ValueError: A negative number, or more than there are virtual tokens.
    """

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        self.peft_type = PeftType.CARTRIDGE
        super().__post_init__()
        frozen, count = self.num_frozen_tokens, self.num_virtual_tokens
        if not isinstance(frozen, int) or isinstance(frozen, bool) or frozen < 0:
            raise ValueError(f"`num_frozen_tokens` should be a whole number from 0 on, got {frozen!r}.")
        if isinstance(count, int) and frozen > count > 0:
            raise ValueError(
                f"`num_frozen_tokens` is {frozen}, but `num_virtual_tokens` is only {count}. Freeze at most as many."
            )


class CartridgeEncoder(PromptTable):
    """The keys and values of all layers, of which the first tokens' are fixed: T = [F; Z], Z being trained.

    Args:
        config: The adapter's configuration, its sizes filled in. F has ``num_frozen_tokens`` rows.
    """

    folded = False
    takes_table = True

    def __init__(self, config: Any) -> None:
        columns, frozen = config.num_layers * 2 * config.token_dim, config.num_frozen_tokens
        super().__init__(config.num_virtual_tokens, columns)
        start = self.embedding.weight.detach()
        del self.embedding
        self.frozen_embedding: torch.Tensor
        self.register_buffer("frozen_embedding", start[:frozen].clone())
        self.trainable_embedding = nn.Parameter(start[frozen:].clone())

    def forward(self) -> torch.Tensor:
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def take(self, table: torch.Tensor) -> None:
        frozen = len(self.frozen_embedding)
        self.frozen_embedding.copy_(table[:frozen])
        fill(self.trainable_embedding, table[frozen:])


class CartridgeModel(PrefixTuner):
    """A base model with cartridges; see :class:`~peft.core.prompt_tuner.PromptTuner`.

    They start as any prefix, from keys and values that every layer knows how to read, until
    :func:`~peft.tuners.cartridge.initialize_kv_prefix_from_text` puts in those of a text.
    """

    table_cls = CartridgeEncoder

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        return CartridgeEncoder(config)
