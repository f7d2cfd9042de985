"""LoRA's model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.holder import BaseTunerLayer
from ...core.kinds import kind_of
from ...core.tuner import BaseTuner
from .layer import LAYERS, Linear, LoraLayer


class LoraModel(BaseTuner):
    """A base model with LoRA adapters (Hu et al. 2021, arXiv 2106.09685); see :class:`~peft.core.tuner.BaseTuner`."""

    layer_cls = LoraLayer
    default_role = "attention"
    prefix = "lora_"

    @classmethod
    def make_layer(cls, base_layer: nn.Module, config: Any) -> LoraLayer:
        innermost = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        kind = kind_of(innermost)
        return LAYERS.get(kind.name if kind else "", Linear)(base_layer)
