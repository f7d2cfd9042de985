"""Which adapters train: an index of the parameters of each adapter, so that switching takes no time beside dozens of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .holder import BaseTunerLayer


class FlagIndex:
    """The parameters of a model's adapters, adapter after adapter.

    As they lie in memory: sixty adapters on 224 layers are 27,000 parameters, and a walk from layer to layer, which jumps from one
    adapter to the next, takes three times as long. What is in the index is checked whenever it is used, and built anew where
    anything in a layer has been added, removed or replaced.
    """

    def __init__(self) -> None:
        # What each slot that holds modules held, next to where it stands now, and by adapter the two dictionaries of each of them.
        self._held: list[dict[str, Any]] = []
        self._by_name: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FlagIndex:
        return type(self)()  # it would copy all of a model along with one of its layers

    def __reduce__(self) -> tuple[type[FlagIndex], tuple[()]]:
        return type(self), ()

    def train_only(self, layers: Sequence[BaseTunerLayer], names: Iterable[str]) -> None:
        """Make adapters of layers trainable and all others frozen.

        Args:
            layers: All of a model's.
            names: The adapters to train.
        """
        trained = set(names)
        holders = [layer._modules[slot] for layer in layers for slot in layer.adapter_layer_names]
        slots: list[dict[str, Any]] = [h._modules for h in holders if h._modules]  # type: ignore[union-attr, misc]
        plain: list[dict[str, Any]] = [h._parameters for h in holders if h._parameters]  # type: ignore[union-attr, misc]
        if self._held != slots:
            self._held = [dict(slot) for slot in slots]
            self._by_name = {}
            for slot in slots:
                for name, module in slot.items():
                    self._by_name.setdefault(name, []).append((module._parameters, module._modules))
        # Frozen first: what two adapters share trains if one of them does.
        for name in _frozen_first(self._by_name, trained):
            wanted = name in trained
            for parameters, inner in self._by_name[name]:
                for parameter in parameters.values():
                    if parameter is not None and parameter.requires_grad is not wanted:
                        set_flag(parameter, wanted)
                if not inner:
                    continue
                for module in inner.values():
                    for parameter in module.parameters():
                        set_flag(parameter, wanted)
        for name in _frozen_first(dict.fromkeys(chain.from_iterable(plain)), trained):
            wanted = name in trained
            for parameters in plain:
                parameter = parameters.get(name)
                if parameter is not None and parameter.requires_grad is not wanted:
                    set_flag(parameter, wanted)


def _frozen_first(names: Iterable[str], trained: set[str]) -> list[str]:
    return sorted(names, key=trained.__contains__)


def set_flag(parameter: torch.Tensor, requires_grad: bool) -> None:
    """Make a parameter trainable or frozen, where its dtype has gradients at all."""
    if not requires_grad or parameter.is_floating_point() or parameter.is_complex():
        parameter.requires_grad = requires_grad  # faster than the method
