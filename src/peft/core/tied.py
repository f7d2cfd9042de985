"""Tied layers: layers that share the weight of an adapted layer and follow its adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .holder import BaseTunerLayer
from .layer import AdapterLayer
from .targets import base_modules


class TiedLayer(AdapterLayer):
    """A layer whose weight is that of another, adapted layer. It has no parameters: the other's adapters act here too.

    Args:
        base_layer: The layer.
        source: The adapted layer with the same weight. What is merged there is merged here.
    """

    def __init__(self, base_layer: nn.Module, source: AdapterLayer) -> None:
        super().__init__(base_layer)
        self.__dict__["follows"] = source  # not as a child, which would give its parameters a second name

    @property
    def source(self) -> AdapterLayer:
        """The adapted layer with the same weight."""
        assert self.follows is not None
        return self.follows

    def has_adapter(self, name: str) -> bool:
        return self.source.has_adapter(name)

    def live_adapters(self) -> list[str]:
        return [] if self._disable_adapters else self.source.live_adapters()

    def needs_weight(self, name: str) -> bool:
        return self.source.needs_weight(name)

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        base, source = self.get_base_layer(), self.source
        if weight is not None:
            weight = source.kind.to_matrix(source.get_base_layer(), self.kind.from_matrix(base, weight))
        change = source.kind.from_matrix(source.get_base_layer(), source.delta(name, weight))
        return self.kind.to_matrix(base, change)

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        return self.source.after_tied(self, name, x, y, earlier)


def sharing(model: nn.Module, base_layer: nn.Module) -> dict[str, nn.Module]:
    """Modules other than this one that have the same weight, by name, with the adapted layers around them."""
    found = {}
    for name, module in base_modules(model).items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if base is not base_layer and base._parameters.get("weight") is base_layer.weight:
            found[name] = module
    return found
