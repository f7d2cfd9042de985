"""Names that other libraries import from ``peft.utils.other``; the code lies in ``peft.core``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.activation import set_adapter
from ..core.architectures import DEFAULTS
from ..core.extra_modules import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ..core.files import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, infer_device
from ..core.holder import adapted_modules
from ..core.preparation import (
    cast_mixed_precision_params,
    fsdp_auto_wrap_policy,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)
from ..core.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..core.targets import EMBEDDING_NAMES

EMBEDDING_LAYER_NAMES = list(EMBEDDING_NAMES)
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = {
    name: row.attention if isinstance(row.attention, str) else list(row.attention) for name, row in DEFAULTS.items()
}


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Parent, module and last part of the name of a module."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze an adapter."""
    for _, layer in adapted_modules(model):
        layer.set_requires_grad(adapter_name, False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activate adapters."""
    set_adapter(model, adapter_name, inference_mode)


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """Number of rows of a call."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds.")
    return given.shape[0]


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The transposed weight where it is stored as (in_features, out_features)."""
    return weight.T if fan_in_fan_out else weight


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What tells two tensors' memory apart."""
    storage: Any = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


__all__ = [
    "CONFIG_NAME", "EMBEDDING_LAYER_NAMES", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "WEIGHTS_NAME", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper",
    "cast_mixed_precision_params", "fsdp_auto_wrap_policy", "infer_device", "prepare_model_for_kbit_training",
    "shift_tokens_right",
]  # fmt: skip
