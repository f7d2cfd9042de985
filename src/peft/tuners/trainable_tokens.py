"""Trainable tokens: single rows of an embedding are trained, and everything else stays frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import PeftType, WeightConfig
from ..core.token_rows import TokenRowsLayer, input_embedding_name
from ..core.tuner import BaseTuner


@dataclass
class TrainableTokensConfig(WeightConfig):
    """Configuration of trainable tokens: rows of an embedding matrix that are replaced by trained ones.

    Args:
        token_indices: The tokens whose rows are trained.
        target_modules: Names or suffixes of the embeddings, or a regular expression; the model's input embedding when not given.
        init_weights: Start from the embedding's own rows, which changes nothing. ``False`` starts from normal random numbers.

    Raises:
        ValueError: No tokens are given.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.TRAINABLE_TOKENS
        super().__post_init__()


class TrainableTokensLayer(TokenRowsLayer):
    """An embedding with trained rows; see :class:`~peft.core.token_rows.TokenRowsLayer`."""

    file_prefix = ""


class TrainableTokensModel(BaseTuner):
    """A base model with trained rows in its embedding; see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = TrainableTokensLayer
    prefix = "trainable_tokens_"

    @classmethod
    def find_defaults(cls, config: Any, model: nn.Module) -> set[str] | str:
        return config.target_modules or input_embedding_name(model)


__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"]
