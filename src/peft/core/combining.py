"""Combining adapters: a new adapter from several others with weights, built in full before the model is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .activation import configs_of
from .checkpoints import file_prefix
from .errors import doubt, shorten
from .extra_modules import ModulesToSaveWrapper
from .holder import adapted_modules, require_adapters
from .injection import check_adapter_name
from .layer import AdapterLayer, Parts


@dataclass
class Share:
    """What one layer contributes to a combination.

    Args:
        target: Name of the adapted module in the base model.
        layer: The adapted layer.
        names: Those of the adapters that are on it.
        weights: Their weights.
    """

    target: str
    layer: AdapterLayer
    names: list[str]
    weights: list[float]


class Combination:
    """How adapters of one method are combined: here by the weighted sum of their parameters.

    A method for which that is not the weighted sum of what the adapters do subclasses this.
    """

    layer_cls: ClassVar[type[AdapterLayer]] = AdapterLayer
    """The layers that it can combine on."""

    def config(self, configs: Sequence[Any], shares: Sequence[Share]) -> Any:
        """Configuration of the new adapter: the first one's, with the targets of all.

        Raises:
            ValueError: The configurations cannot be brought together, or what is left out is doubtful and strict is on.
        """
        new = copy.copy(configs[0])
        _unite_targets(new, configs, [share.target for share in shares])
        if any(getattr(c, "bias", "none") != "none" for c in configs):
            doubt(
                "Some of the adapters trained biases of the base model. These are no part of the combination: the new adapter's "
                "file will hold none.",
                stacklevel=5,
            )
            new.bias = "none"
        return new

    def parts(self, share: Share, config: Any) -> Parts:
        """The new adapter's parts on one layer.

        Raises:
            ValueError: The adapters cannot be combined on it.
        """
        layer = share.layer
        if not layer.adds_up:
            raise ValueError(f"a weighted sum of {type(layer).__name__} parameters is no weighted sum of their effects")
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in zip(share.names, share.weights, strict=True):
            for slot, tensor in slot_tensors(layer, name).items():
                term = tensor.detach() * weight
                tensors[slot] = tensors[slot] + term if slot in tensors else term
        return Parts(layer.settings(config, share.target), tensors)

    def check(self, shares: Sequence[Share], parts: Sequence[Parts]) -> None:
        """Report what is doubtful about the result, before it is put in place.

        Raises:
            ValueError: When strict.
        """


def combine(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, how: Combination
) -> None:
    """Add an adapter that combines others. It is inactive and frozen; nothing else changes.

    Args:
        model: The base model with the adapters in it.
        adapters: Their names; all of one method.
        weights: A weight for each.
        adapter_name: Name of the new adapter.
        how: What combining means for the method.

    Raises:
        ValueError: Unknown names, adapters of several methods, or adapters that cannot be combined. The model is as it was.
    """
    known = configs_of(model)
    check_adapter_name(adapter_name, known)
    if isinstance(adapters, str) or len(set(adapters)) < len(adapters):
        raise ValueError(f"`adapters` should be a list of different adapter names, got {adapters!r}.")
    names = require_adapters(model, adapters, known)
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapters need as many weights, got {len(weights)}: {list(weights)}.")
    numbers = [float(w) for w in weights]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"The weights of a combination should be finite numbers, got {list(weights)}.")
    configs = [known[n] for n in names]
    kinds = {n: getattr(c.peft_type, "value", c.peft_type) for n, c in zip(names, configs, strict=True)}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"Only adapters of one method can be combined, but these are of several: {kinds}.")
    shares = _shares(model, names, numbers, how.layer_cls)
    config = how.config(configs, shares)
    parts = []
    for share in shares:
        try:
            parts.append(_like_sources(share, how.parts(share, config)))
        except ValueError as error:
            raise ValueError(f"Cannot combine {shorten(share.names)} on {share.target!r}: {error}") from error
    followers = _followers(model, shares)
    how.check(shares, parts)
    for share, made in zip(shares, parts, strict=True):
        share.layer.install(adapter_name, made)
        for follower in followers.get(id(share.layer), ()):
            follower.install(adapter_name, Parts())
    known[adapter_name] = config


def _shares(model: nn.Module, names: list[str], weights: list[float], layer_cls: type[AdapterLayer]) -> list[Share]:
    """The layers that hold any of the adapters.

    Raises:
        ValueError: Adapters train a module in full: two trained copies have no common origin to be combined from.
    """
    shares = []
    for name, module in adapted_modules(model):
        here = [(n, w) for n, w in zip(names, weights, strict=True) if module.has_adapter(n)]
        if not here or (isinstance(module, AdapterLayer) and isinstance(module.follows, layer_cls)):
            continue
        if isinstance(module, layer_cls):
            shares.append(Share(file_prefix(name), module, [n for n, _ in here], [w for _, w in here]))
        elif isinstance(module, ModulesToSaveWrapper):
            raise ValueError(
                f"Cannot combine {shorten(n for n, _ in here)}: {name!r} is trained in full (modules_to_save), and whole modules "
                "are not combined."
            )
        else:
            raise ValueError(
                f"Cannot combine {shorten(n for n, _ in here)}: they train {name!r}, a {type(module).__name__}."
            )
    return shares


def _followers(model: nn.Module, shares: Sequence[Share]) -> dict[int, list[AdapterLayer]]:
    """The layers that share a weight with those of the adapters and follow them, by the identity of the layer followed.

    Raises:
        ValueError: They follow some of the adapters only.
    """
    found: dict[int, list[AdapterLayer]] = {}
    by_layer = {id(share.layer): share for share in shares}
    for name, module in adapted_modules(model):
        share = by_layer.get(id(getattr(module, "follows", None)))
        if share is None or not isinstance(module, AdapterLayer):
            continue
        tied = [n for n in share.names if module.has_adapter(n)]
        if tied and tied != share.names:
            raise ValueError(
                f"Cannot combine {shorten(share.names)}: of these only {shorten(tied)} act on {name!r} too, which shares its weight with "
                f"{share.target!r}. Combine adapters that agree in ensure_weight_tying."
            )
        if tied:
            found.setdefault(id(share.layer), []).append(module)
    return found


def _like_sources(share: Share, parts: Parts) -> Parts:
    """The parts with the dtype and device that the sources' parameters have."""
    sources = slot_tensors(share.layer, share.names[0])
    for slot, tensor in parts.tensors.items():
        parts.tensors[slot] = tensor.detach().to(sources[slot]).contiguous()
    return parts


def slot_tensors(layer: AdapterLayer, name: str) -> dict[str, torch.Tensor]:
    """An adapter's parameter in each slot of a layer."""
    tensors: dict[str, torch.Tensor] = {}
    for slot, entry in layer.adapter_entries(name):
        holder: Any = entry
        tensors[slot] = holder.weight if isinstance(entry, nn.Module) else holder
    return tensors


def _unite_targets(new: Any, configs: Sequence[Any], names: list[str]) -> None:
    """Let a configuration mean the modules that any of these adapt, whose full names are given."""
    scopes = [[getattr(c, f, None) for f in _SCOPE] for c in configs]
    targets = [c.target_modules for c in configs]
    if any(scope != scopes[0] for scope in scopes):
        for field in _SCOPE:
            if hasattr(new, field):
                setattr(new, field, None)
    elif all(t == targets[0] for t in targets):
        return
    elif not any(isinstance(t, str) for t in targets):
        new.target_modules = set().union(*targets)
        return
    new.target_modules = set(names)  # no shorter way to say it


_SCOPE = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Fields that narrow down what ``target_modules`` means."""
