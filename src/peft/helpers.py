"""Small helpers around a model with adapters (``peft.helpers``)."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from .config import PeftConfig
from .core.checkpoints import get_peft_model_state_dict, set_peft_model_state_dict
from .core.holder import adapted_modules, require_adapters
from .core.layer import AdapterLayer
from .core.undo import undone_on_failure
from .kernels.recompute import recompute_inputs as recompute_inputs
from .model import PeftModel
from .registry import in_form
from .tuners.lora.dora import DoraCaching as DoraCaching


def update_forward_signature(model: nn.Module) -> None:
    """Give a PeftModel's ``forward`` the signature and documentation of the base model's."""
    _adopt(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Give a PeftModel's ``generate`` the signature and documentation of the base model's."""
    _adopt(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Give a PeftModel the base model's signatures.

    Args:
        model: The PeftModel.
        method: ``"forward"``, ``"generate"`` or ``"all"``.

    Raises:
        ValueError: Another method.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"`method` should be 'forward', 'generate' or 'all', got {method!r}.")
    for name in ("forward", "generate") if method == "all" else (method,):
        _adopt(model, name)


def _adopt(model: Any, name: str) -> None:
    source = getattr(model.get_base_model(), name, None)
    if source is None:
        return
    current = getattr(type(model), name)

    @functools.wraps(source)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return current(self, *args, **kwargs)

    signature = inspect.signature(source)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    call.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    setattr(model, name, MethodType(call, model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or Hub id holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:
        return False
    return True


def convert_adapter(model: PeftModel, adapter_name: str, peft_type: str, new_name: str) -> None:
    """Add an adapter of another method that gives the same outputs as one that is there; it is inactive and frozen.

    P-tuning v2 and prefix tuning become each other where they coincide.

    Args:
        model: The model.
        adapter_name: The adapter that is there. It stays as it is.
        peft_type: The other method, for example ``"PREFIX_TUNING"``.
        new_name: Name of the new adapter.

    Raises:
        ValueError: Unknown or taken names, or the other method has no such adapter. The model is as it was.
    """
    require_adapters(model, adapter_name, model.peft_config)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors, config = in_form(peft_type, tensors, copy.copy(model.peft_config[adapter_name]))
    with undone_on_failure(model.get_base_model()):
        model.add_adapter(new_name, config)
        set_peft_model_state_dict(model, tensors, adapter_name=new_name)


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this context the active adapters' scaling is multiplied.

    Args:
        model: A model with adapters that have a ``scaling``.
        multiplier: The factor.

    Raises:
        TypeError: The factor is no number.
        ValueError: The model has no such adapters.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"The multiplier should be a number, got {type(multiplier).__name__}.")
    layers: list[Any] = [m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer) and hasattr(m, "scaling")]
    if not layers:
        raise ValueError("The model has no adapters with a scaling, such as LoRA's.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.active_adapters:
                if name in layer.scaling:
                    layer.scaling[name] = layer.scaling[name] * multiplier
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this context adapters take their input in the dtype that it has, instead of casting it to their own.

    Args:
        model: A model with adapters.
        active: Do nothing when false.
    """
    layers = [m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled
