"""How transformers' own ``from_pretrained`` finds the place of each key of an adapter's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..registry import get_method


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Renamings from an adapter's file to a model with the adapter injected.

    Args:
        weight_conversions: transformers' conversions for the base model's checkpoint; its renamings also hold for adapters.
        adapter_name: Name of the adapter in the model.
        peft_config: The adapter's configuration.

    Returns:
        Renamings in the order in which they apply.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    keep = [c for c in weight_conversions or () if not isinstance(c, WeightConverter)]
    if peft_config is None:
        return [WeightRenaming(r"^base_model\.model\.", ""), *keep]
    outer, own = get_method(peft_config.peft_type).tuner_cls.file_renamings(adapter_name)
    return [*(WeightRenaming(*r) for r in outer), *keep, *(WeightRenaming(*r) for r in own)]


__all__ = ["build_peft_weight_mapping"]
