"""Layer replication: a deeper model made of a model's own layers, some of them several times, that share their weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_ATTRIBUTE = "_peft_replication"


class Replication:
    """A model's list of layers as it was before it was replicated.

    Kept as a plain attribute of the base model: outside the state dict, copied with it.
    """

    def __init__(self, model: nn.Module, name: str, ranges: list[list[int]]) -> None:
        self.name, self.ranges = name, ranges
        self.layers: nn.ModuleList = model.get_submodule(name)  # type: ignore[assignment]
        keys = ("num_hidden_layers", "layer_types")
        self.values = {key: v for key in keys if (v := getattr(model.config, key, None)) is not None}

    def apply(self, model: nn.Module) -> None:
        """Put the longer list of layers in place. Each layer stands in it itself once; further ones share its weights."""
        order = [number for start, end in self.ranges for number in range(start, end)]
        used: set[int] = set()
        layers = []
        for place, number in enumerate(order):
            layer = self.layers[number] if number not in used else _twin(self.layers[number])
            used.add(number)
            layers.append((layer, number, place))
        for layer, number, place in layers:  # twins are made before their originals are numbered anew
            _renumber(layer, number, place)
        self._put(model, nn.ModuleList(layer for layer, _, _ in layers).train(self.layers.training))
        for key, value in self.values.items():
            setattr(model.config, key, len(order) if isinstance(value, int) else [value[number] for number in order])

    def undo(self, model: nn.Module) -> None:
        """Put the original layers back."""
        order = [number for start, end in self.ranges for number in range(start, end)]
        for number, layer in enumerate(self.layers):
            if number in order:
                _renumber(layer, order.index(number), number)
        self._put(model, self.layers)
        for key, value in self.values.items():
            setattr(model.config, key, value)

    def _put(self, model: nn.Module, layers: nn.ModuleList) -> None:
        parent, _, child = self.name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers)


@contextlib.contextmanager
def replicated(model: nn.Module, config: Any, known: Mapping[str, Any]) -> Iterator[None]:
    """Make the model as deep as the configuration's ``layer_replication`` says; an error inside the context undoes it.

    Args:
        model: The base model, changed in place.
        config: The adapter's configuration: a list of ranges ``[start, end)`` of layers, which follow one another.
        known: Configurations of the adapters that the model has already.

    Raises:
        ValueError: The ranges do not fit the model, or it has other adapters already.
    """
    ranges = [list(pair) for pair in getattr(config, "layer_replication", None) or ()]
    present: Replication | None = model.__dict__.get(_ATTRIBUTE)
    if not ranges or (present is not None and present.ranges == ranges):
        yield
        return
    if present is not None or known:
        raise ValueError(
            f"layer_replication={ranges} changes the base model, so every adapter of it has to be made for the same: here it is "
            f"{present.ranges if present else 'not replicated'}. Use the same ranges, or a base model of its own."
        )
    replication = Replication(model, _list_of_layers(model), ranges)
    count = len(replication.layers)
    wrong = [pair for pair in ranges if not 0 <= pair[0] < pair[1] <= count]
    if wrong:
        raise ValueError(
            f"layer_replication has the ranges {wrong}, but the layers of this model go from 0 to {count}."
        )
    replication.apply(model)
    model.__dict__[_ATTRIBUTE] = replication
    try:
        yield
    except BaseException:
        restore(model)
        raise


def is_replicated(model: nn.Module) -> bool:
    """Whether a model has been made deeper."""
    return _ATTRIBUTE in model.__dict__


def restore(model: nn.Module) -> None:
    """Give a replicated model its own layers back."""
    replication: Replication | None = model.__dict__.pop(_ATTRIBUTE, None)
    if replication is not None:
        replication.undo(model)


# -- steps -----------------------------------------------------------------------------------------------------------


def _list_of_layers(model: nn.Module) -> str:
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    if len(lists) != 1:
        found = f"found {', '.join(lists)}" if lists else "found none"
        raise ValueError(
            "layer_replication needs a model with one list of as many layers as config.num_hidden_layers says, but a "
            f"{type(model).__name__} with {count} has no such thing: {found}."
        )
    return next(iter(lists))


def _twin(layer: nn.Module) -> nn.Module:
    """A copy of a layer with the same parameters, buffers and configuration."""
    shared = [m.__dict__["config"] for m in layer.modules() if "config" in m.__dict__]
    return copy.deepcopy(
        layer, {id(value): value for value in itertools.chain(layer.parameters(), layer.buffers(), shared)}
    )


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    """Tell a layer's parts its new number, by which they find their place in the cache."""
    for module in layer.modules():
        if module.__dict__.get("layer_idx") == old:
            module.layer_idx = new  # type: ignore[assignment]
