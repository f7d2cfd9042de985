"""Prompt tuning: trained embeddings in front of the input's (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch

from ..config import PeftType, PromptLearningConfig
from ..core.prompt_tuner import Geometry, TokenTuner
from ..core.prompts import PromptTable
from ..core.tokens import TEXT_FIELDS, checked_start, text_tokens


class PromptTuningInit(str, enum.Enum):
    """How virtual tokens start.

    ``TEXT``: from the embeddings of a text; ``SAMPLE_VOCAB``: from those of tokens drawn from the vocabulary; ``RANDOM``: from
    normal random numbers.
    """

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Configuration of prompt tuning.

    Args:
        prompt_tuning_init: How virtual tokens start, see :class:`PromptTuningInit`.
        prompt_tuning_init_text: The text, for ``TEXT``. It is repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: Its tokenizer, for ``TEXT``.
        tokenizer_kwargs: Arguments for the tokenizer's ``from_pretrained``.

    Raises:
        ValueError: Unknown start, or a text start without text or tokenizer.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.PROMPT_TUNING
        super().__post_init__()
        self.prompt_tuning_init = checked_start(self, PromptTuningInit, {"TEXT": TEXT_FIELDS})
        if self.tokenizer_kwargs and self.prompt_tuning_init is not PromptTuningInit.TEXT:
            raise ValueError("`tokenizer_kwargs` are used with prompt_tuning_init='TEXT' only. Leave them out.")


class PromptEmbedding(PromptTable):
    """The virtual tokens of prompt tuning: their table is the parameter.

    Args:
        config: The adapter's configuration, its sizes filled in.
        word_embeddings: The base model's embeddings, to start from.
    """

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        super().__init__(rows, config.token_dim)
        weight = word_embeddings.weight
        if (
            config.prompt_tuning_init is PromptTuningInit.RANDOM
            or config.inference_mode
            or weight.device.type == "meta"
        ):
            return
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(weight.shape[0], (rows,)).tolist()
        else:
            ids = text_tokens(config, rows, weight.shape[0])
        with torch.no_grad():
            self.embedding.weight.copy_(word_embeddings(torch.tensor(ids, device=weight.device)))


class PromptTuningModel(TokenTuner):
    """A base model with virtual tokens; see :class:`~peft.core.prompt_tuner.PromptTuner`."""

    @classmethod
    def make_table(cls, config: Any, geometry: Geometry, model: Any) -> PromptTable:
        return PromptEmbedding(config, model.get_input_embeddings())
