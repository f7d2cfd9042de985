"""Parameter-efficient fine-tuning of pretrained models. Public names are imported on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0"

_PLACES = {
    "config": ("PeftConfig", "PeftType", "PromptLearningConfig", "TaskType"),
    "core.errors": ("NoMatchingPeftModuleError", "PeftError", "PeftWarning"),
    "mapping": ("get_peft_config", "get_peft_model", "inject_adapter_in_model"),
    "model": ("PeftMixedModel", "PeftModel"),
    "task_models": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftModelForCausalLM", "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
    ),
    "core.status": ("get_layer_status", "get_model_status"),
    "core.checkpoints": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "core.files": ("load_peft_weights",),
    "core.preparation": ("cast_mixed_precision_params", "prepare_model_for_kbit_training", "shift_tokens_right"),
    "tuners.bottleneck": ("BottleneckConfig", "BottleneckModel"),
    "tuners.cartridge": ("CartridgeConfig", "CartridgeEncoder"),
    "tuners.cartridge.utils": (
        "compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
    ),
    "tuners.cpt": ("CPTConfig", "CPTEmbedding"),
    "tuners.ia3": ("IA3Config", "IA3Model"),
    "tuners.loha": ("LoHaConfig", "LoHaModel"),
    "tuners.lokr": ("LoKrConfig", "LoKrModel"),
    "tuners.lora": ("LoraConfig", "LoraModel", "LoraRuntimeConfig"),
    "tuners.multitask_prompt_tuning": (
        "MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    ),
    "tuners.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "tuners.p_tuning_v2": ("PTuningV2Config",),
    "tuners.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "tuners.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "tuners.trainable_tokens": ("TrainableTokensConfig", "TrainableTokensModel"),
}  # fmt: skip
_HOME = {name: module for module, names in _PLACES.items() for name in names}
_SUBMODULES = {
    "auto", "config", "core", "functional", "helpers", "kernels", "lycoris", "mapping", "mapping_func", "mixed_model", "model",
    "optimizers", "peft_model", "recipes", "registry", "task_models", "tuners", "utils",
}  # fmt: skip

__all__ = sorted(_HOME)
# Needs the extra `train`; not in __all__, so that `from peft import *` works without it.
_HOME["finetune"] = "recipes.finetune"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        from .registry import get_method, registered_types

        return {t: get_method(t).config_cls for t in registered_types()}
    if name == "PEFT_TYPE_TO_TUNER_MAPPING":
        from .registry import get_method, registered_types

        return {t: get_method(t).tuner_cls for t in registered_types()}
    from .core.errors import did_you_mean

    raise AttributeError(f"module 'peft' has no attribute {name!r}{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})


if TYPE_CHECKING:
    from .auto import AutoPeftModel as AutoPeftModel
    from .auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .config import PeftConfig as PeftConfig
    from .config import PeftType as PeftType
    from .config import PromptLearningConfig as PromptLearningConfig
    from .config import TaskType as TaskType
    from .core.checkpoints import get_peft_model_state_dict as get_peft_model_state_dict
    from .core.checkpoints import set_peft_model_state_dict as set_peft_model_state_dict
    from .core.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from .core.errors import PeftError as PeftError
    from .core.errors import PeftWarning as PeftWarning
    from .core.files import load_peft_weights as load_peft_weights
    from .core.preparation import cast_mixed_precision_params as cast_mixed_precision_params
    from .core.preparation import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .core.preparation import shift_tokens_right as shift_tokens_right
    from .core.status import get_layer_status as get_layer_status
    from .core.status import get_model_status as get_model_status
    from .mapping import get_peft_config as get_peft_config
    from .mapping import get_peft_model as get_peft_model
    from .mapping import inject_adapter_in_model as inject_adapter_in_model
    from .model import PeftMixedModel as PeftMixedModel
    from .model import PeftModel as PeftModel
    from .recipes.finetune import finetune as finetune
    from .task_models import PeftModelForCausalLM as PeftModelForCausalLM
    from .task_models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from .task_models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from .task_models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from .task_models import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from .task_models import PeftModelForTokenClassification as PeftModelForTokenClassification
    from .tuners.bottleneck import BottleneckConfig as BottleneckConfig
    from .tuners.bottleneck import BottleneckModel as BottleneckModel
    from .tuners.cartridge import CartridgeConfig as CartridgeConfig
    from .tuners.cartridge import CartridgeEncoder as CartridgeEncoder
    from .tuners.cartridge.utils import compose_cartridge_adapters as compose_cartridge_adapters
    from .tuners.cartridge.utils import (
        initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
    )
    from .tuners.cartridge.utils import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
    from .tuners.cpt import CPTConfig as CPTConfig
    from .tuners.cpt import CPTEmbedding as CPTEmbedding
    from .tuners.ia3 import IA3Config as IA3Config
    from .tuners.ia3 import IA3Model as IA3Model
    from .tuners.loha import LoHaConfig as LoHaConfig
    from .tuners.loha import LoHaModel as LoHaModel
    from .tuners.lokr import LoKrConfig as LoKrConfig
    from .tuners.lokr import LoKrModel as LoKrModel
    from .tuners.lora import LoraConfig as LoraConfig
    from .tuners.lora import LoraModel as LoraModel
    from .tuners.lora import LoraRuntimeConfig as LoraRuntimeConfig
    from .tuners.multitask_prompt_tuning import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from .tuners.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from .tuners.multitask_prompt_tuning import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from .tuners.p_tuning import PromptEncoder as PromptEncoder
    from .tuners.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .tuners.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .tuners.p_tuning_v2 import PTuningV2Config as PTuningV2Config
    from .tuners.prefix_tuning import PrefixEncoder as PrefixEncoder
    from .tuners.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .tuners.prompt_tuning import PromptEmbedding as PromptEmbedding
    from .tuners.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .tuners.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .tuners.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from .tuners.trainable_tokens import TrainableTokensModel as TrainableTokensModel
