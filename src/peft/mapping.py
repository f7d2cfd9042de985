"""From a configuration to a model: ``get_peft_model``, ``inject_adapter_in_model`` and their look-ups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import PeftConfig, TaskType
from .core.errors import PeftWarning, strictness
from .core.holder import adapted_modules
from .core.injection import inject
from .model import PeftMixedModel, PeftModel
from .registry import get_method
from .task_models import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    strict: bool | None = None,
) -> PeftModel:
    """Put an adapter into a base model and hold it.

    Args:
        model: The base model, changed in place.
        peft_config: The adapter's configuration.
        adapter_name: Its name.
        mixed: Return a :class:`~peft.PeftMixedModel`. Every model here can hold adapters of several weight methods.
        autocast_adapter_dtype: Keep adapter parameters in float32 where the base model is in half precision.
        revision: Revision of the base model, recorded in the configuration.
        low_cpu_mem_usage: Make the adapter's parameters on the meta device.
        strict: Raise instead of warning about doubtful things.

    Returns:
        A model of the class that ``peft_config.task_type`` names.

    Raises:
        ValueError: The configuration does not suit the model. The model is as it was.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is a PeftModel already. Use model.add_adapter(name, config) for a further adapter, or model.unload() first."
        )
    if any(True for _ in adapted_modules(model)):
        warnings.warn(
            "The model holds adapters already; this adds one more. For a fresh start call .unload() on the earlier model first.",
            PeftWarning,
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft_config has revision {peft_config.revision!r}; it is set to the given {revision!r}.",
                PeftWarning,
                stacklevel=2,
            )
        peft_config.revision = revision
    new_name = getattr(model, "name_or_path", None)
    if new_name:
        peft_config.base_model_name_or_path = new_name
    with strictness(strict):
        return (PeftMixedModel if mixed else model_class(peft_config))(
            model,
            peft_config,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )


def model_class(config: PeftConfig, asked: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """The model class of a configuration's task; a subclass that was asked for explicitly wins."""
    if asked is not PeftModel or config.task_type is None:
        return asked
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(config.task_type).value]


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    strict: bool | None = None,
) -> nn.Module:
    """Put an adapter into a base model without a holder around it, and make it the active one.

    Args:
        peft_config: The adapter's configuration.
        model: The base model, changed in place.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Make its parameters on the meta device.
        state_dict: Tensors of the adapter: the layers that these name are adapted. They are not loaded.
        strict: Raise instead of warning about doubtful things.

    Returns:
        The same model.

    Raises:
        ValueError: The configuration does not suit the model. The model is as it was.
    """
    tuner_cls = get_method(peft_config.peft_type).tuner_cls
    with strictness(strict):
        inject(
            model, peft_config, adapter_name, tuner_cls, on_meta=low_cpu_mem_usage, state_dict=state_dict, activate=True
        )
    return model


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Make a configuration from a dictionary with ``peft_type``.

    Raises:
        ValueError: Unknown ``peft_type``.
    """
    return get_method(config_dict["peft_type"]).config_cls(**config_dict)
