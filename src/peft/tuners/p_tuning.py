"""P-tuning: virtual tokens at the input, made by a small network while they train (Liu et al. 2021, arXiv 2103.10385)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftType, PromptLearningConfig
from ..core.errors import did_you_mean
from ..core.prompt_tuner import Geometry, TokenTuner
from ..core.prompts import PromptTable


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Configuration of P-tuning.

    Args:
        encoder_reparameterization_type: ``MLP`` or ``LSTM``.
        encoder_hidden_size: Width of the hidden layers; the size of an embedding when not given.
        encoder_num_layers: Number of layers of the LSTM.
        encoder_dropout: Dropout between the layers of the LSTM.

    Raises:
        ValueError: Unknown network.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.peft_type = PeftType.P_TUNING
        super().__post_init__()
        known = [t.value for t in PromptEncoderReparameterizationType]
        asked = self.encoder_reparameterization_type
        kind = str(getattr(asked, "value", asked)).upper()
        if kind not in known:
            raise ValueError(
                f"Unknown `encoder_reparameterization_type` {asked!r}{did_you_mean(kind, known)}. Use one of {', '.join(known)}."
            )
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(kind)
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"`encoder_dropout` should be at least 0 and less than 1, got {self.encoder_dropout}.")


class PromptEncoder(PromptTable):
    """The network of P-tuning: h = MLP(E), or h = MLP(BiLSTM(E)) (section 3.2); all rows are made at once, as one sequence.

    Args:
        config: The adapter's configuration, its sizes filled in.
    """

    folded = False

    def __init__(self, config: Any) -> None:
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        size, hidden = config.token_dim, config.encoder_hidden_size
        super().__init__(rows, size)
        if config.encoder_reparameterization_type is PromptEncoderReparameterizationType.LSTM:
            layers = config.encoder_num_layers
            self.lstm_head = nn.LSTM(
                size,
                hidden,
                layers,
                dropout=config.encoder_dropout if layers > 1 else 0.0,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(hidden * 2, hidden * 2), nn.ReLU(), nn.Linear(hidden * 2, size))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, size)
            )

    def forward(self) -> torch.Tensor:
        table = self.embedding.weight
        if hasattr(self, "lstm_head"):
            table = self.lstm_head(table[None])[0][0]
        return self.mlp_head(table)


class PromptEncoderModel(TokenTuner):
    """A base model with virtual tokens of P-tuning; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    @classmethod
    def fill(cls, config: Any, geometry: Geometry) -> dict[str, Any]:
        values = super().fill(config, geometry)
        return {**values, "encoder_hidden_size": config.encoder_hidden_size or geometry.embedding_size}

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        return PromptEncoder(config)
