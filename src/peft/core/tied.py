"""Tied layers: layers that share the weight of an adapted layer and follow its adapters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .holder import BaseTunerLayer
from .layer import AdapterLayer, Parts


class TiedLayer(AdapterLayer):
    """A layer whose weight is that of another, adapted layer. It has no parameters: adapters of the other act here too.

    Args:
        base_layer: The layer.
        source: The adapted layer with the same weight. What is merged there is merged here.
    """

    def __init__(self, base_layer: nn.Module, source: AdapterLayer) -> None:
        super().__init__(base_layer)
        self.__dict__["follows"] = source  # not as a child, which would give its parameters a second name
        self._followed: set[str] = set()

    @property
    def source(self) -> AdapterLayer:
        """The adapted layer with the same weight."""
        assert self.follows is not None
        return self.follows

    def install(self, name: str, parts: Parts, first: AdapterLayer | None = None) -> None:
        """Follow an adapter of the other layer."""
        self._followed.add(name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._followed.discard(adapter_name)

    def has_adapter(self, name: str) -> bool:
        return name in self._followed and self.source.has_adapter(name)

    @property
    def is_tied(self) -> bool:
        """Whether the weights are still one: some loaders give each module its own."""
        return same_tensor(self.weight, self.source.weight)

    def live_adapters(self) -> list[str]:
        merged = self.source.merged_adapters if self.is_tied else ()
        return [n for n in super().live_adapters() if n not in merged]

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


def follower(module: nn.Module, source: AdapterLayer) -> TiedLayer | None:
    """The layer that follows this one among those that wrap one another at a place."""
    while isinstance(module, AdapterLayer):
        if isinstance(module, TiedLayer) and module.follows is source:
            return module
        module = module.base_layer
    return None


def by_weight(modules: Mapping[str, nn.Module]) -> dict[int, dict[str, nn.Module]]:
    """The modules that hold a weight, by its identity and their name.

    Args:
        modules: Modules of the base model by name, those with adapters around them included.
    """
    found: dict[int, dict[str, nn.Module]] = {}
    for name, module in modules.items():
        weight = plain(module)._parameters.get("weight")
        if weight is not None:
            found.setdefault(id(weight), {})[name] = module
    return found


def tied_modules(shared: Mapping[int, Mapping[str, nn.Module]], name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Other modules that are tied to one by their weight, by name.

    Args:
        shared: What :func:`by_weight` found.
        name: The module's name.
        module: The module, with or without adapters around it.
    """
    base = plain(module)
    group = shared.get(id(getattr(base, "weight", base)), {})
    return {n: m for n, m in group.items() if plain(m) is not base and not are_copies(n, name)}


def tied_to(heads: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules outside these that share a weight with them, by name.

    Args:
        heads: Modules by name.
        modules: All modules of the base model.
    """
    owners: dict[int, list[str]] = {}
    for head, module in heads.items():
        for parameter in plain(module).parameters():
            owners.setdefault(id(parameter), []).append(head)
    return {
        name: module
        for key, group in by_weight(modules).items()
        for name, module in group.items()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
        and not all(are_copies(name, head) for head in owners.get(key, ()))
    }


def leaders(heads: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each of some modules the first that shares a parameter with it: itself, where none does."""
    owners: dict[int, list[str]] = {}
    found: dict[str, str] = {}
    for name, module in heads.items():
        ids = [id(p) for p in plain(module).parameters()]
        twin = next((other for i in ids for other in owners.get(i, ()) if not are_copies(other, name)), name)
        found[name] = found.get(twin, name)
        for i in ids:
            owners.setdefault(i, []).append(name)
    return found


def are_copies(one: str, other: str) -> bool:
    """Whether two names differ in numbers only: such modules share a weight as copies of one layer, and are no tied pair."""
    return one != other and re.sub(r"\.\d+(?=\.|$)", ".#", f".{one}") == re.sub(r"\.\d+(?=\.|$)", ".#", f".{other}")


def embeddings_are_tied(model: nn.Module) -> bool:
    """Whether a model's input and output embeddings share their weight."""
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            layers.append(getattr(model, getter)())
    found = [plain(layer)._parameters.get("weight") for layer in layers if layer is not None]
    weights = [weight for weight in found if weight is not None]
    return len(weights) == 2 and same_tensor(*weights)


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two parameters are one, or share their memory."""
    return a is b or (
        a.shape == b.shape and a.device == b.device != torch.device("meta") and a.data_ptr() == b.data_ptr()
    )


def plain(module: nn.Module) -> nn.Module:
    """A module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
