"""Hot-swapping: other values into an adapter in use, without new parameters, so that compiled code and optimisers stay valid."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import checkpoints
from .activation import configs_of
from .errors import PeftWarning, shorten
from .holder import BaseTunerLayer, adapted_modules, require_adapters
from .injection import bias_parameters
from .layer import AdapterLayer


@dataclass
class _Swap:
    """New values for an adapter on one layer."""

    layer: BaseTunerLayer
    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    settings: dict[str, Any]


def check_compatible(old: Any, new: Any) -> None:
    """Refuse a configuration whose adapter cannot take another's place.

    Args:
        old: Configuration of the adapter in the model.
        new: That of the values to come.

    Raises:
        ValueError: Another method, one that cannot be swapped, or fields differ that decide what is computed.
    """
    if old.peft_type != new.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {old.peft_type.value} and {new.peft_type.value}.")
    if old.swap_keys is None:
        raise ValueError(f"Hotswapping is not supported for {old.peft_type.value}.")
    differing = {f: (getattr(old, f), getattr(new, f)) for f in old.swap_keys if getattr(old, f) != getattr(new, f)}
    if differing:
        listed = "; ".join(f"{name} is {was!r}, and {to!r} in the new one" for name, (was, to) in differing.items())
        raise ValueError(f"Configs are incompatible: {listed}. Load the adapter under another name instead.")


def swap(model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, config: Any) -> None:
    """Replace the values of an adapter by those of another one, which may adapt fewer layers.

    Args:
        model: The model, compiled or not.
        tensors: The other adapter's tensors by file key.
        adapter_name: The adapter in the model.
        config: The other adapter's configuration.

    Raises:
        ValueError: Unknown adapter, it is merged, or the other one does not fit. The model is as it was.
        RuntimeError: The other one adapts layers that this one does not.
    """
    model = getattr(model, "_orig_mod", model)
    known = configs_of(model)
    require_adapters(model, adapter_name, known)
    old = known[adapter_name]
    check_compatible(old, config)
    given = _by_place(model, tensors, adapter_name)
    swaps = [
        _plan(name, layer, adapter_name, config, given)
        for name, layer in adapted_modules(model)
        if layer.has_adapter(adapter_name) and not (isinstance(layer, AdapterLayer) and layer.follows is not None)
    ]
    biases = [(p, given[n]) for n, p in bias_parameters(model, old, adapter_name).items() if n in given]
    # From here on nothing fails.
    with torch.no_grad():
        for parameter, value in itertools.chain(biases, *(entry.tensors for entry in swaps)):
            if parameter.shape == value.shape:
                parameter.copy_(value)
            else:
                parameter.data = value
    for entry in swaps:
        if isinstance(entry.layer, AdapterLayer):
            entry.layer.retune(adapter_name, entry.settings)
    config = copy.copy(config)
    # Layers that the new adapter leaves out hold zeros: they are still adapted.
    config.target_modules, config.inference_mode = old.target_modules, old.inference_mode
    known[adapter_name] = config


def prepare(model: nn.Module, rank: int | None, check_compiled: str) -> None:
    """Make room for adapters of other ranks and scales, so that swapping changes no shape and no constant of compiled code.

    Args:
        model: A model with adapters, not compiled yet.
        rank: Largest rank to come; the adapters' own when not given.
        check_compiled: What to do where the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        ValueError: The model is compiled already, has no adapters that can be prepared, or one has a larger rank. It is as it was.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    compiled = hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in model.modules())
    if compiled and check_compiled != "ignore":
        message = "Call prepare_model_for_compiled_hotswap before compiling the model: compiled code keeps the shapes that it saw."
        if check_compiled == "error":
            raise ValueError(message)
        warnings.warn(message, PeftWarning, stacklevel=3)
    model = getattr(model, "_orig_mod", model)
    layers = [m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer) and m.zeros_do_nothing]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, or none of a method that can be swapped. Load an adapter first."
        )
    for layer in layers:
        layer.make_room(rank, dry_run=True)
    for layer in layers:
        layer.make_room(rank)


def _by_place(model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors by the file keys that the model knows.

    Raises:
        RuntimeError: It has no place for some.
    """
    places: dict[str, str] = {}
    for file_key, own_key, _ in checkpoints.adapter_tensors(model, adapter_name):
        places |= {own_key: file_key, file_key: file_key}  # some callers give keys of the model
    found = {key: checkpoints.placed(key, places) for key in tensors}
    again = checkpoints.followers(model)
    unexpected = [
        k for k, place in found.items() if place is None and not k.removeprefix(checkpoints.PREFIX).startswith(again)
    ]
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {shorten(unexpected)}. An adapter can be "
            f"replaced by one that adapts the same layers or fewer; load this one beside {adapter_name!r} with load_adapter."
        )
    return {places[place]: tensors[key] for key, place in found.items() if place is not None}


def _plan(name: str, layer: BaseTunerLayer, adapter_name: str, config: Any, given: Mapping[str, torch.Tensor]) -> _Swap:
    """The new values for one layer, in the shapes that it takes.

    Raises:
        ValueError: The adapter is merged, or tensors are missing or of the wrong shape.
    """
    if adapter_name in layer.merged_adapters:
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into {name!r}. Call unmerge_adapter() before swapping it."
        )
    target = checkpoints.file_prefix(name)
    settings: dict[str, Any] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if isinstance(layer, AdapterLayer):
        settings = layer.settings(config, target.removeprefix(checkpoints.PREFIX))
        parts = layer.shapes(config, settings)
        shapes = {layer.own_key(part, adapter_name): (part, shape) for part, shape in parts.items()}
    places = {
        f"{target}.{file_key}" if target else file_key: own_key
        for file_key, own_key, _ in layer.adapter_tensors(adapter_name)
    }
    absent = [key for key in places if key not in given]
    can_be_left_out = (
        isinstance(layer, AdapterLayer) and layer.zeros_do_nothing and not layer.needs_weight(adapter_name)
    )
    if absent and not (can_be_left_out and len(absent) == len(places)):
        raise ValueError(f"The new adapter lacks tensors for {name!r}: {shorten(absent)}. Is its file complete?")
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for key, own_key in places.items():
        parameter = layer.get_parameter(own_key)
        part, shape = shapes.get(own_key, ("", tuple(parameter.shape)))
        value = given[key].to(parameter) if key in given else parameter.new_zeros(shape)
        if value.shape != shape:
            raise ValueError(
                f"{key} has the shape {tuple(value.shape)}; with its configuration it should have {shape}."
            )
        if isinstance(layer, AdapterLayer):
            value = layer.into_room(adapter_name, part, value, parameter.shape)
        pairs.append((parameter, value))
    return _Swap(layer, pairs, settings)
