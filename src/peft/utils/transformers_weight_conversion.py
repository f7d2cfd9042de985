"""How transformers' own ``from_pretrained`` finds the place of each key of an adapter's file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..core.token_rows import TokenRowsLayer
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

    mapping: list[Any] = [WeightRenaming(r"^base_model\.model\.", "")]
    mapping += [c for c in weight_conversions or () if not isinstance(c, WeightConverter)]
    if peft_config is None:
        return mapping
    layer_cls = get_method(peft_config.peft_type).tuner_cls.layer_cls
    for slot in layer_cls.linear_slots:
        for leaf in ("weight", "bias"):
            mapping.append(WeightRenaming(rf"\.{re.escape(slot)}\.{leaf}$", f".{slot}.{adapter_name}.{leaf}"))
    for slot in layer_cls.vector_slots:
        mapping.append(WeightRenaming(rf"\.{re.escape(slot)}$", f".{slot}.{adapter_name}.weight"))
    for cls in dict.fromkeys((layer_cls, TokenRowsLayer)):
        for slot in cls.parameter_slots:
            mapping.append(WeightRenaming(rf"\.{re.escape(cls.file_prefix + slot)}$", f".{slot}.{adapter_name}"))
    return mapping


__all__ = ["build_peft_weight_mapping"]
