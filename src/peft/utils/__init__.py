"""Names that other libraries import from ``peft.utils``; the code lies in ``peft.core``."""

from ..config import PeftType, TaskType
from ..core.checkpoints import get_peft_model_state_dict, set_peft_model_state_dict
from ..core.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from ..core.extra_modules import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ..core.files import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, infer_device, load_peft_weights
from ..core.preparation import cast_mixed_precision_params, prepare_model_for_kbit_training, shift_tokens_right
from ..registry import register_method as register_peft_method
from .other import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    _freeze_adapter,
    _get_batch_size,
    _get_submodules,
    _set_adapter,
    id_tensor_storage,
    transpose,
)

__all__ = [
    "CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "WEIGHTS_NAME", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError", "PeftError", "PeftType", "PeftWarning", "TaskType", "_freeze_adapter", "_get_batch_size",
    "_get_submodules", "_set_adapter", "cast_mixed_precision_params", "get_peft_model_state_dict", "id_tensor_storage",
    "infer_device", "load_peft_weights", "prepare_model_for_kbit_training", "register_peft_method", "set_peft_model_state_dict",
    "shift_tokens_right", "transpose",
]  # fmt: skip
