"""Real tokens to start virtual ones from."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import nn

from .errors import did_you_mean

TEXT_FIELDS = (("prompt_tuning_init_text", "the text"), ("tokenizer_name_or_path", "its tokenizer"))
"""What a start from a text needs, in words."""


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


def checked_start(config: Any, starts: type[enum.Enum], needs: dict[str, tuple[tuple[str, str], ...]]) -> Any:
    """The start that a configuration's ``prompt_tuning_init`` names, in any case of letters.

    Args:
        config: The configuration.
        starts: The starts that its method knows.
        needs: For starts that read other fields these fields, and what each is in words.

    Raises:
        ValueError: There is no such start, or it lacks what it starts from.
    """
    asked = config.prompt_tuning_init
    known = [start.value for start in starts]
    name = str(getattr(asked, "value", asked)).upper()
    if name not in known:
        raise ValueError(
            f"Unknown `prompt_tuning_init` {asked!r}{did_you_mean(name, known)}. Use one of {', '.join(known)}."
        )
    for field, what in needs.get(name, ()):
        if not getattr(config, field):
            raise ValueError(f"With prompt_tuning_init={name!r}, `{field}` has to be given: {what} to start from.")
    return starts(name)
