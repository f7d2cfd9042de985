"""Real tokens to start virtual ones from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def special_ids(config: Any) -> set[int]:
    """Ids of tokens that stand for no text, as far as a model's configuration names them."""
    found: set[int] = set()
    for name in (
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "cls_token_id",
        "sep_token_id",
        "decoder_start_token_id",
    ):
        value = getattr(config, name, None)
        found.update(value if isinstance(value, (list, tuple)) else [value] if isinstance(value, int) else [])
    return found


def real_tokens(model: nn.Module, count: int) -> torch.Tensor:
    """Ids of tokens drawn from the model's vocabulary, (1, count); the same each time for the same model.

    Tokens that stand for no text are left out, where the model's configuration names them.
    """
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    special = special_ids(getattr(model, "config", None))
    order = [i for i in torch.randperm(size, generator=generator).tolist() if i not in special]
    while len(order) < count:
        order += order or [0]
    return torch.tensor([order[:count]])


def text_tokens(config: Any, count: int, vocabulary: int) -> list[int]:
    """Ids of the tokens of the text that a configuration names to start from, repeated or cut to the number wanted.

    Args:
        config: Has ``prompt_tuning_init_text``, ``tokenizer_name_or_path`` and ``tokenizer_kwargs``.
        count: How many.
        vocabulary: Number of tokens that the model knows.

    Raises:
        ValueError: The text has no tokens, or such that the model does not know.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(
            f"The text {config.prompt_tuning_init_text!r} has no tokens. Give a longer `prompt_tuning_init_text`."
        )
    ids = [ids[i % len(ids)] for i in range(count)]
    if max(ids) >= vocabulary:
        raise ValueError(
            f"The tokenizer {config.tokenizer_name_or_path!r} gives token {max(ids)}, but the model knows only {vocabulary}. "
            "Use the model's own tokenizer."
        )
    return ids
