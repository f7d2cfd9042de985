"""Activation: which adapters of a model are in use, trainable, or gone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .errors import PeftWarning
from .holder import BaseTunerLayer, adapted_modules, require_adapters


def configs_of(model: nn.Module) -> dict[str, Any]:
    """Configurations of all adapters of a model by name."""
    return getattr(model, "peft_config", None) or {}


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Make adapters active and trainable, and all others inactive and frozen.

    Args:
        model: The model.
        adapter_name: One name or several.
        inference_mode: Leave the active ones frozen too.
        layer_cls: Touch only layers of this class.

    Raises:
        ValueError: Unknown name, or two of them train the same module in full. Nothing is changed then.
    """
    layers = [layer for _, layer in adapted_modules(model) if isinstance(layer, layer_cls)]
    names = require_adapters(model, adapter_name, configs_of(model) or {n for m in layers for n in m.adapter_names()})
    for layer in layers:
        if "modules_to_save" in layer._modules:
            layer.copy_of(names)  # type: ignore[operator]  # raises, before anything has been changed
    if layers:
        layers[0]._shared.flags.train_only(layers, () if inference_mode else names)
    for layer in layers:
        # Past torch's own bookkeeping, which takes longer than all the rest.
        layer.__dict__["_active_adapter"] = list(names)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable or frozen, whether or not they are active.

    Raises:
        ValueError: Unknown name.
    """
    layers = [layer for _, layer in adapted_modules(model)]
    names = require_adapters(model, adapter_names, configs_of(model) or {n for m in layers for n in m.adapter_names()})
    for layer in layers:
        layer.set_requires_grad(names, requires_grad)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters of a model on or off; off restores the base model's outputs."""
    for _, layer in adapted_modules(model):
        layer.enable_adapters(enabled)


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str | None = None,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> list[str] | None:
    """Remove an adapter's parameters from a model. Its configuration is the caller's to remove.

    Args:
        model: The model.
        adapter_name: The adapter.
        prefix: Accepted for compatibility; the layers know their adapters.
        layer_cls: Touch only layers of this class.

    Returns:
        The adapters that are active afterwards, or ``None``.
    """
    layers = [layer for _, layer in adapted_modules(model) if isinstance(layer, layer_cls)]
    was_active = any(adapter_name in layer.active_adapters for layer in layers)
    was_trained = any(p.requires_grad for layer in layers for p in layer.adapter_parameters(adapter_name))
    for layer in layers:
        layer.delete_adapter(adapter_name)
    active = next((layer.active_adapters for layer in layers), [])
    left = [n for n in configs_of(model) if n != adapter_name] or list(
        dict.fromkeys(n for layer in layers for n in layer.adapter_names())
    )
    if was_active and not active and left:
        # Something has to be active: the first that is left, trainable only if the deleted one was.
        warnings.warn(
            f"Adapter {adapter_name!r} was active and is now deleted. Active from now on: {left[0]!r}.",
            PeftWarning,
            stacklevel=3,
        )
        for layer in layers:
            layer._active_adapter = [left[0]]
            if was_trained:
                layer.set_requires_grad(left[0])
        active = [left[0]]
    return active or None


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context a model behaves as its base model; afterwards every flag is as it was, merged adapters included."""
    layers = [layer for _, layer in adapted_modules(model)]
    merged = [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged_adapters]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    switched = [(layer, layer.disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled in switched:
            layer._disable_adapters = was_disabled
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        # Inner layers first, as they were merged.
        for layer, names in reversed(merged):
            layer.merge(adapter_names=names)  # type: ignore[operator]


def check_not_merged(model: nn.Module, what: str) -> None:
    """Refuse an operation while adapters are merged.

    Raises:
        ValueError: With how to mend it.
    """
    for name, layer in adapted_modules(model):
        if layer.merged:
            raise ValueError(
                f"Cannot {what} while adapters are merged ({name!r}: {layer.merged_adapters}). Call unmerge_adapter() first."
            )
