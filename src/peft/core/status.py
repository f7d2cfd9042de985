"""Status: what adapters a model holds, where, and in which state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .activation import configs_of
from .holder import adapted_modules
from .layer import AdapterLayer

Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"


@dataclass
class TunerLayerStatus:
    """State of one adapted layer.

    Args:
        name: Name of the layer in the base model's holder.
        module_type: Method and kind of layer, as printed for the module.
        enabled: Whether adapters are switched on.
        active_adapters: Names of the active adapters.
        merged_adapters: Names of the adapters merged into the base weight.
        requires_grad: By adapter: whether its parameters train; ``"irregular"`` if only some do.
        available_adapters: All adapters on the layer.
        devices: By adapter: where its parameters are.
        quantization_backend: How the base layer is quantised, if it is.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """State of a whole model; ``"irregular"`` stands where layers differ.

    Args:
        base_model_type: Class of the base model.
        adapter_model_type: Class of the method's model, or ``"None"``.
        peft_types: Method of each adapter.
        trainable_params: Number of parameters that train.
        total_params: Number of all parameters.
        num_adapter_layers: Number of adapted layers.
        enabled: Whether adapters are switched on.
        active_adapters: Names of the active adapters.
        merged_adapters: Names of the merged adapters.
        requires_grad: By adapter: whether its parameters train.
        available_adapters: All adapters.
        devices: By adapter: where its parameters are.
        quantization_backend: How the base model is quantised, if it is.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """State of each adapted layer.

    Args:
        model: A :class:`~peft.PeftModel`, or a model with injected adapters.

    Raises:
        ValueError: The model has no adapters.
    """
    root = _holder(model)
    statuses = []
    for name, layer in adapted_modules(root):
        by_adapter = {n: list(layer.adapter_parameters(n)) for n in sorted(layer.adapter_names())}
        statuses.append(
            TunerLayerStatus(
                name=name,
                module_type=layer._get_name(),
                enabled=not layer.disable_adapters,
                active_adapters=layer.active_adapters,
                merged_adapters=list(layer.merged_adapters),
                requires_grad={n: _common([p.requires_grad for p in ps]) for n, ps in by_adapter.items() if ps},
                available_adapters=sorted(layer.adapter_names()),
                devices={n: sorted({_place(p) for p in ps}) for n, ps in by_adapter.items()},
            )
        )
    if not statuses:
        raise ValueError("No adapter layers found in the model: it is no PeftModel, or its adapters were unloaded.")
    return statuses


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """State of a model with adapters.

    Args:
        model: A :class:`~peft.PeftModel`, or a model with injected adapters.

    Raises:
        ValueError: The model has no adapters.
    """
    root = _holder(model)
    layers = [layer for _, layer in adapted_modules(root)]
    statuses = get_layer_status(model)
    base = getattr(model, "get_base_model", lambda: model)()
    configs = configs_of(model)
    trainable, total = count_parameters(model)
    available = sorted({n for s in statuses for n in s.available_adapters})
    adapter_params = {n: [p for layer in layers for p in layer.adapter_parameters(n)] for n in available}
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(root).__name__ if root is not base else "None",
        peft_types={n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(statuses),
        enabled=_common([s.enabled for s in statuses]),
        active_adapters=_common([s.active_adapters for s in statuses]),
        merged_adapters=_merged(root),
        requires_grad={n: _common([p.requires_grad for p in ps]) for n, ps in adapter_params.items() if ps},
        available_adapters=available,
        devices={n: sorted({d for s in statuses for d in s.devices.get(n, [])}) for n in available},
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable and of all parameters; a 4-bit weight counts as what it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        size = parameter.numel()
        if size == 0 and hasattr(parameter, "ds_numel"):  # DeepSpeed ZeRO-3 keeps the shape elsewhere
            size = parameter.ds_numel
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * getattr(getattr(parameter, "quant_storage", None), "itemsize", 1)
        total += size
        if parameter.requires_grad:
            trainable += size
    return trainable, total


def _place(parameter: nn.Parameter) -> str:
    device = parameter.device
    return device.type if device.index is None else str(device)


def _holder(model: nn.Module) -> nn.Module:
    return getattr(model, "base_model") if hasattr(model, "get_base_model") else model  # noqa: B009


def _common(values: Iterable[Any]) -> Any:
    values = list(values)
    return values[0] if values and all(v == values[0] for v in values) else IRREGULAR


def _merged(root: nn.Module) -> list[str] | Irregular:
    """The merged adapters; regular if each is merged on every layer that has it."""
    layers = [layer for _, layer in adapted_modules(root) if isinstance(layer, AdapterLayer)]
    merged = {n for layer in layers for n in layer.merged_adapters}
    if any(merged.intersection(layer.adapter_names()) != set(layer.merged_adapters) for layer in layers):
        return IRREGULAR
    return sorted(merged)
