"""Builds a model of any transformers model type on the meta device, where the largest model costs no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

VALUES: dict[str, dict[str, Any]] = {
    # Types whose default configuration cannot be built, lacks the layers in question, or has very many of them.
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "nllb-moe": {"num_experts": 4},
    "videomae": {"num_frames": 2},
}

FROM_WHOLE = {"mllama_text_model": ("mllama", "AutoModelForCausalLM")}
"""Types of a part of a model that no auto class builds alone: the whole's type, and the class that makes the part."""

TASK_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
)
"""Tried in this order for types that have no bare model."""


@contextlib.contextmanager
def without_start_values() -> Iterator[None]:
    """Linear layers draw no start values inside: on the meta device that would take time and leave nothing."""
    with mock.patch.object(nn.Linear, "reset_parameters", lambda self: None):
        yield


def build_on_meta(model_type: str) -> PreTrainedModel:
    """A model of this type with its default configuration, the bare model where there is one.

    Args:
        model_type: A key of transformers' ``CONFIG_MAPPING``, or of :data:`FROM_WHOLE`.

    Raises:
        ImportError: The type needs a package that is not installed.
        ValueError: No auto class of transformers builds the type.
    """
    whole, part_class = FROM_WHOLE.get(model_type, (model_type, None))
    with torch.device("meta"), without_start_values():
        config = CONFIG_MAPPING[whole](**VALUES.get(whole, {}))
        if part_class is not None:
            return getattr(transformers, part_class).from_config(config)
        if type(config) in MODEL_MAPPING:
            found = MODEL_MAPPING[type(config)]
            # Some types have several bare models; the first is the complete one.
            return (found[0] if isinstance(found, tuple | list) else found)._from_config(config)
        for name in TASK_CLASSES:
            auto_class = getattr(transformers, name)
            if type(config) in auto_class._model_mapping:
                return auto_class.from_config(config)
    raise ValueError(f"transformers has no auto class for models of type {model_type!r}")
