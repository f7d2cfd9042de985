"""Reads the adapter folders of adapter-hub's library `adapters`: Houlsby, Pfeiffer and parallel ones, as bottleneck adapters.

What stands here was found by running that library, version 1.3.0, and comparing outputs (``tests/test_adapter_hub.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.errors import did_you_mean, doubt
from .places import PLACES

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "LMHeadModel": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
TRAINED_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# Fields that have to have these values, or be missing, since adapters work otherwise with others.
FIXED: Mapping[str, Any] = {
    "original_ln_after": True, "residual_before_ln": True, "adapter_residual_before_ln": False, "ln_after": False,
    "use_gating": False, "phm_layer": False, "inv_adapter": None, "cross_adapter": False, "stochastic_depth": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where that library keeps adapters in the models of one type.

    Attributes:
        layers: Name of the list that holds the layers.
        attention: Expression for the module that holds the adapters of the attention, and the module here whose output they change.
        output: The same for the feed-forward network, with a module for each placement.
        inputs: What parallel adapters read, where that is not what they read here by default; see ``input_modules``.
    """

    layers: str
    attention: tuple[str, str]
    output: tuple[str, Mapping[str, str]]
    inputs: Mapping[str, str] = field(default_factory=dict)


def _pre_norm(layers: str, attention: str, network: str, norm: str) -> Layout:
    """A layer that normalises before attention and network; its parallel adapters read the sum before the norm."""
    return Layout(
        layers,
        (r"(.*)\.attention_adapters", rf"\1.{attention}"),
        (
            r"(.*)\.output_adapters",
            {"houlsby": rf"\1.mlp.{network}", "pfeiffer": r"\1.bottleneck", "parallel": r"\1.mlp.bottleneck"},
        ),
        {r"(.*)\.mlp": rf"\1.{norm}"},
    )


_BERT = Layout(
    "layer",
    (r"(.*\.attention\.output)", r"\1.dense"),
    (r"(.*\.output)", {"houlsby": r"\1.dense", "pfeiffer": r"\1.LayerNorm", "parallel": r"\1.dense"}),
)
_LLAMA = _pre_norm("layers", "self_attn.o_proj", "down_proj", "post_attention_layernorm")
_T5_NETWORK = r"\1.DenseReluDense"
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    "distilbert": Layout(
        "layer",
        (r"(.*)\.attention_adapters", r"\1.attention.out_lin"),
        (
            r"(.*)\.output_adapters",
            {"houlsby": r"\1.ffn.lin2", "pfeiffer": r"\1.output_layer_norm", "parallel": r"\1.ffn.bottleneck"},
        ),
    ),
    "gpt2": _pre_norm("h", "attn.c_proj", "c_proj", "ln_2"),
    **dict.fromkeys(("llama", "mistral"), _LLAMA),
    "t5": Layout(
        "block",
        (r"(.*\.layer\.0)", r"\1.SelfAttention.o"),
        (
            r"(.*\.layer\.[12])",
            {
                "houlsby": rf"{_T5_NETWORK}.wo",
                "pfeiffer": r"\1.bottleneck",
                "parallel": rf"{_T5_NETWORK}.bottleneck",
            },
        ),
        {r"(.*)\.DenseReluDense": r"\1.layer_norm"},
    ),
    "bart": Layout(
        "layers",
        (r"(.*)\.attention_adapters", r"\1.self_attn.out_proj"),
        (
            r"(.*)\.output_adapters",
            {"houlsby": r"\1.fc2", "pfeiffer": r"\1.final_layer_norm", "parallel": r"\1.fc2"},
        ),
    ),
}


def recognises(values: Mapping[str, Any]) -> bool:
    """Whether a file ``adapter_config.json`` was written by that library."""
    return "peft_type" not in values and isinstance(values.get("config"), Mapping) and "model_type" in values


def read_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`~peft.BottleneckConfig` that says the same.

    Args:
        values: What stands in the folder's ``adapter_config.json``.

    Raises:
        NotImplementedError: The adapter is of a kind that is not read here, or for a model type that is not.
    """
    theirs, layout = values["config"], _layout(values)
    placement = _placement(theirs)
    places, attention, output = PLACES[values["model_type"]], theirs.get("mh_adapter"), theirs.get("output_adapter")
    targets = places.targets(placement)
    if placement == "houlsby" and not (attention and output):
        targets = places.attention if attention else places.feedforward
    if left_out := theirs.get("leave_out"):
        if values["model_type"] in ("t5", "bart"):
            _refuse("leave_out", left_out, "the layers of an encoder and a decoder are numbered through there")
        numbers = "|".join(map(str, left_out))
        targets = rf"(?!(?:.*\.)?{layout.layers}\.(?:{numbers})(?:\.|$))(?:{targets})"
    factors = theirs.get("reduction_factor", 16)
    single = factors if isinstance(factors, Mapping) else {}
    return {
        "peft_type": "BOTTLENECK",
        "task_type": next((t for end, t in TASKS.items() if str(values.get("model_class")).endswith(end)), None),
        "base_model_name_or_path": values.get("model_name") or None,
        "inference_mode": True,
        "placement": placement,
        "target_modules": targets,
        "input_modules": dict(layout.inputs or places.inputs) or None if placement == "parallel" else None,
        "reduction_factor": single.get("default", 16) if single else factors,
        "reduction_factor_pattern": {
            rf"(.*\.)?{layout.layers}\.{number}(\..*)?": factor
            for number, factor in single.items()
            if number != "default"
        },
        "non_linearity": theirs.get("non_linearity", "relu"),
        "dropout": theirs.get("dropout", 0.0),
        "scaling": theirs.get("scaling", 1.0),
        "ln_before": bool(theirs.get("ln_before")),
    }


def read_weights(
    read: Callable[[str], dict[str, torch.Tensor] | None], values: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the keys of this library's files, with the head of a task where the folder has a plain one.

    Args:
        read: Gives the tensors of a file in the folder, or ``None`` where there is no such file.
        values: What stands in the folder's ``adapter_config.json``.

    Raises:
        ValueError: There is no file with weights.
    """
    tensors, head = _first(read, WEIGHTS), _first(read, HEADS)
    if tensors is None:
        raise ValueError(
            f"The folder of an adapter from adapter-hub lacks its weights: expected {' or '.join(WEIGHTS)}."
        )
    config, layout = read_config(values), _layout(values)
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if (place := _split(key, values["name"])) is None:
            found[key] = tensor  # reported as of no use, with its name
        elif (slot := _slot(place[1], config["ln_before"])) is not None:
            found[f"base_model.model.{_module(place[0], layout, config['placement'])}.{slot}"] = tensor
    for key in [k for k in found if k.endswith(".norm_before.weight")]:
        stem = key.removesuffix("norm_before.weight")
        pair = found.pop(key), found.pop(f"{stem}norm_before.bias")
        found[f"{stem}bottleneck_norm_before"] = torch.stack(pair)
    if config["task_type"] in TRAINED_HEADS:
        found |= {f"base_model.model.{k}": v for k, v in (head or {}).items()}
    elif any(key.startswith("heads.") for key in head or {}):
        doubt(
            f"The adapter {values['name']!r} from adapter-hub has a head of that library's own kind, which is not read: outputs "
            "are those of the model's head. Train one, or copy the weights from the folder's head file."
        )
    return found


def _placement(theirs: Mapping[str, Any]) -> str:
    if (kind := theirs.get("architecture")) is not None:
        _refuse("architecture", kind, "it is no single bottleneck adapter")
    for name, wanted in FIXED.items():
        if theirs.get(name, wanted) != wanted:
            _refuse(name, theirs[name], f"only {wanted!r} is")
    if theirs.get("scaling") == "channel":
        _refuse("scaling", "channel", "numbers and 'learned' are")
    if not theirs.get("mh_adapter") and not theirs.get("output_adapter"):
        _refuse("output_adapter", False, "there is no adapter then")
    if not theirs.get("is_parallel") and not theirs.get("original_ln_before"):
        return "houlsby"
    if theirs.get("mh_adapter"):
        _refuse("mh_adapter", True, "with these other fields only adapters of the feed-forward network are")
    return "parallel" if theirs.get("is_parallel") else "pfeiffer"


def _layout(values: Mapping[str, Any]) -> Layout:
    model_type = str(values["model_type"])
    if model_type not in LAYOUTS:
        raise NotImplementedError(
            f"Adapters from adapter-hub for models of type {model_type!r} are not read{did_you_mean(model_type, LAYOUTS)}. Known: "
            f"{', '.join(sorted(LAYOUTS))}."
        )
    return LAYOUTS[model_type]


def _refuse(name: str, value: Any, why: str) -> None:
    raise NotImplementedError(f"An adapter from adapter-hub with {name}={value!r} is not read: {why}.")


def _first(
    read: Callable[[str], dict[str, torch.Tensor] | None], names: tuple[str, ...]
) -> dict[str, torch.Tensor] | None:
    return next((tensors for name in names if (tensors := read(name)) is not None), None)


def _split(key: str, adapter: str) -> tuple[str, str] | None:
    """Where an adapter's tensor belongs to, and which it is."""
    found = re.fullmatch(rf"(.+)\.adapters\.{re.escape(adapter)}\.(.+)", key)
    return None if found is None else (found[1], found[2])


def _module(place: str, layout: Layout, placement: str) -> str:
    expression, module = layout.attention
    if placement == "houlsby" and (found := re.fullmatch(expression, place)) is not None:
        return found.expand(module)
    expression, modules = layout.output
    found = re.fullmatch(expression, place)
    return place if found is None else found.expand(modules[placement])


def _slot(part: str, ln_before: bool) -> str | None:
    """What a tensor is called here; ``None`` for what stands in the file twice."""
    if ln_before and part.startswith("adapter_down.0."):
        return None  # the norm, which is there as adapter_norm_before too
    names = {
        f"adapter_down.{int(ln_before)}.weight": "bottleneck_down.weight",
        f"adapter_down.{int(ln_before)}.bias": "bottleneck_down_bias",
        "adapter_up.weight": "bottleneck_up.weight",
        "adapter_up.bias": "bottleneck_up_bias",
        "adapter_norm_before.weight": "norm_before.weight",
        "adapter_norm_before.bias": "norm_before.bias",
        "scaling": "bottleneck_scale",
    }
    return names.get(part, part)
