"""Holds the public names next to the peer's: signatures, config fields and defaults, enum members, tables."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Lab

FUNCTIONS = (
    "peft.get_peft_model",
    "peft.get_peft_config",
    "peft.inject_adapter_in_model",
    "peft.get_peft_model_state_dict",
    "peft.set_peft_model_state_dict",
    "peft.load_peft_weights",
    "peft.get_layer_status",
    "peft.get_model_status",
    "peft.prepare_model_for_kbit_training",
    "peft.cast_mixed_precision_params",
    "peft.tuners.lokr.layer.factorization",
    "peft.functional.cast_adapter_dtype",
    "peft.functional.delete_adapter",
    "peft.functional.get_peft_model_state_dict",
    "peft.functional.inject_adapter_in_model",
    "peft.functional.set_adapter",
    "peft.functional.set_peft_model_state_dict",
    "peft.functional.set_requires_grad",
    "peft.helpers.check_if_peft_model",
    "peft.helpers.disable_input_dtype_casting",
    "peft.helpers.rescale_adapter_scale",
    "peft.helpers.update_forward_signature",
    "peft.helpers.update_generate_signature",
    "peft.helpers.update_signature",
    "peft.optimizers.create_lorafa_optimizer",
    "peft.optimizers.create_loraplus_optimizer",
    "peft.utils._get_submodules",
    "peft.utils.get_peft_model_state_dict",
    "peft.utils.load_peft_weights",
    "peft.utils.prepare_model_for_kbit_training",
    "peft.utils.set_peft_model_state_dict",
    "peft.utils.other.fsdp_auto_wrap_policy",
    "peft.utils.transformers_weight_conversion.build_peft_weight_mapping",
    *(f"peft.utils.hotswap.{name}" for name in ("hotswap_adapter", "hotswap_adapter_from_state_dict")),
    *(
        f"peft.utils.hotswap.{name}"
        for name in ("check_hotswap_configs_compatible", "prepare_model_for_compiled_hotswap")
    ),
    *(
        f"peft.utils.merge_utils.{name}"
        for name in ("prune", "magnitude_based_pruning", "random_pruning", "disjoint_merge")
    ),
    *(
        f"peft.utils.merge_utils.{name}"
        for name in ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")
    ),
    *(f"peft.utils.merge_utils.{name}" for name in ("calculate_majority_sign_mask", "reshape_weight_task_tensors")),
    "peft.compose_cartridge_adapters",
    "peft.initialize_kv_prefix_from_past_key_values",
    "peft.initialize_kv_prefix_from_text",
    "peft.tuners.cartridge.utils.prompt_embeddings_from_past_key_values",
)

# Class -> its members. "" is the class itself: its bases, and its fields if it is a dataclass.
CLASSES: dict[str, tuple[str, ...]] = {
    "peft.PeftModel": (
        "",
        "__init__",
        "active_adapters",
        "active_peft_config",
        "add_adapter",
        "base_model_torch_dtype",
        "create_or_update_model_card",
        "delete_adapter",
        "disable_adapter",
        "forward",
        "from_pretrained",
        "generate",
        "get_base_model",
        "get_layer_status",
        "get_model_status",
        "get_nb_trainable_parameters",
        "has_active_enabled_adapter",
        "load_adapter",
        "modules_to_save",
        "peft_config",
        "prepare_model_for_gradient_checkpointing",
        "print_trainable_parameters",
        "push_to_hub",
        "save_pretrained",
        "set_adapter",
        "set_requires_grad",
    ),
    "peft.PeftModelForSequenceClassification": ("", "__init__", "forward"),
    "peft.PeftModelForTokenClassification": ("", "__init__", "forward"),
    "peft.PeftModelForQuestionAnswering": ("", "__init__", "forward"),
    "peft.PeftModelForFeatureExtraction": ("", "__init__", "forward"),
    "peft.PeftModelForCausalLM": ("", "__init__", "forward", "generate", "prepare_inputs_for_generation"),
    "peft.PeftModelForSeq2SeqLM": ("", "__init__", "forward", "generate", "prepare_inputs_for_generation"),
    "peft.PeftMixedModel": ("", "__init__", "active_adapter", "add_adapter", "from_pretrained", "set_adapter"),
    "peft.AutoPeftModel": ("", "from_pretrained"),
    "peft.AutoPeftModelForCausalLM": ("", "from_pretrained"),
    "peft.AutoPeftModelForSeq2SeqLM": ("", "from_pretrained"),
    "peft.AutoPeftModelForSequenceClassification": ("", "from_pretrained"),
    "peft.AutoPeftModelForTokenClassification": ("", "from_pretrained"),
    "peft.AutoPeftModelForQuestionAnswering": ("", "from_pretrained"),
    "peft.AutoPeftModelForFeatureExtraction": ("", "from_pretrained"),
    "peft.PeftConfig": (
        "",
        "from_json_file",
        "from_peft_type",
        "from_pretrained",
        "is_adaption_prompt",
        "is_prompt_learning",
        "push_to_hub",
        "save_pretrained",
        "to_dict",
    ),
    "peft.LoraConfig": ("", "from_pretrained", "save_pretrained", "to_dict"),
    "peft.TrainableTokensConfig": ("",),
    "peft.TrainableTokensModel": ("",),
    "peft.tuners.trainable_tokens.TrainableTokensLayer": ("",),
    "peft.IA3Config": ("",),
    "peft.LoHaConfig": ("",),
    "peft.LoKrConfig": ("",),
    "peft.MultitaskPromptTuningConfig": ("",),
    "peft.CartridgeConfig": ("",),
    "peft.CPTConfig": ("",),
    "peft.MultitaskPromptTuningInit": ("",),
    "peft.tuners.multitask_prompt_tuning.MultitaskPromptEmbedding": ("",),
    "peft.tuners.cartridge.CartridgeEncoder": ("",),
    "peft.tuners.cpt.CPTEmbedding": ("",),
    "peft.IA3Model": ("", "add_weighted_adapter", "merge_and_unload", "prefix", "unload"),
    "peft.LoHaModel": ("", "merge_and_unload", "prefix", "unload"),
    "peft.LoKrModel": ("", "merge_and_unload", "prefix", "unload"),
    "peft.tuners.ia3.layer.IA3Layer": ("",),
    "peft.tuners.ia3.layer.Linear": ("", "forward", "merge", "unmerge"),
    "peft.tuners.loha.layer.LoHaLayer": ("", "adapter_layer_names", "get_delta_weight", "scale_layer", "set_scale"),
    "peft.tuners.loha.layer.Linear": ("", "forward", "merge", "unmerge"),
    "peft.tuners.lokr.layer.LoKrLayer": ("", "adapter_layer_names", "get_delta_weight", "scale_layer", "set_scale"),
    "peft.tuners.lokr.layer.Linear": ("", "forward", "merge", "unmerge"),
    "peft.LoraModel": (
        "",
        "active_adapters",
        "add_weighted_adapter",
        "delete_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "forward",
        "inject_adapter",
        "merge_adapter",
        "merge_and_unload",
        "prefix",
        "set_adapter",
        "set_requires_grad",
        "unload",
        "unmerge_adapter",
    ),
    "peft.tuners.tuners_utils.BaseTunerLayer": (
        "",
        "active_adapter",
        "active_adapters",
        "delete_adapter",
        "disable_adapters",
        "enable_adapters",
        "get_base_layer",
        "merge",
        "merged",
        "set_adapter",
        "set_requires_grad",
        "unmerge",
        "weight",
        "bias",
    ),
    "peft.tuners.lora.LoraLayer": (
        "",
        "scale_layer",
        "set_scale",
        "unscale_layer",
        "get_base_layer",
    ),
    "peft.tuners.lora.Linear": ("", "forward", "get_delta_weight", "merge", "unmerge"),
    "peft.tuners.lora.Embedding": ("", "forward", "get_delta_weight", "merge", "unmerge"),
    "peft.tuners.lora.layer.Conv1d": ("", "forward", "get_delta_weight", "merge", "unmerge"),
    "peft.tuners.lora.layer.Conv2d": ("", "forward", "get_delta_weight", "merge", "unmerge"),
    "peft.tuners.lora.layer.Conv3d": ("", "forward", "get_delta_weight", "merge", "unmerge"),
    "peft.utils.ModulesToSaveWrapper": (
        "",
        "active_adapter",
        "active_adapters",
        "disable_adapters",
        "enable_adapters",
        "set_adapter",
        "set_requires_grad",
        "delete_adapter",
    ),
    "peft.utils.other.AuxiliaryTrainingWrapper": ("", "active_adapters", "enable_adapters", "set_adapter"),
    "peft.utils.other.ModulesToSaveWrapper": ("",),
    "peft.tuners.lora.layer.LoraLayer": ("",),
    "peft.PeftType": ("",),
    "peft.TaskType": ("",),
    "peft.PeftWarning": ("",),
    "peft.PeftError": ("",),
    "peft.NoMatchingPeftModuleError": ("",),
}

VALUES = (
    "peft.utils.CONFIG_NAME",
    "peft.utils.WEIGHTS_NAME",
    "peft.utils.SAFETENSORS_WEIGHTS_NAME",
    "peft.utils.INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "peft.utils.other.EMBEDDING_LAYER_NAMES",
    "peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
)

MEMBERS = tuple(f"{owner}.{member}" for owner, members in CLASSES.items() for member in members if member)
ALL = (*FUNCTIONS, *CLASSES, *MEMBERS, *VALUES)

# Base classes that programs test for with isinstance, issubclass or except.
TELLING_BASES = {
    *("Module", "PeftModel", "PeftConfig", "PushToHubMixin", "BaseTuner", "BaseTunerLayer", "LoraLayer"),
    *("AuxiliaryTrainingWrapper", "PeftError", "Warning", "UserWarning", "Exception", "ValueError", "str"),
}


def described(lab: Lab, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The name as this library and as the peer has it."""
    __tracebackhide__ = True
    answers = lab.ask("surface", names=list(ALL))
    wanted, got = answers["peer"][name], answers["ours"][name]
    if "error" in wanted:
        pytest.fail(f"The peer has no {name}: {wanted['error']['message']}", pytrace=False)
    if "error" in got:
        pytest.fail(f"{name} is missing: {got['error']['type']}: {got['error']['message']}", pytrace=False)
    return got, wanted


def check_parameters(got: list[list[Any]], wanted: list[list[Any]]) -> None:
    """Fail unless every call that fits the peer's signature fits ours with the same meaning."""
    __tracebackhide__ = True
    ours = {name: (kind, default, required) for name, kind, default, required in got}
    open_keywords = any(kind == "VAR_KEYWORD" for _, kind, _, _ in got)
    for name, kind, default, required in wanted:
        if kind in ("VAR_POSITIONAL", "VAR_KEYWORD"):
            assert any(kind == other for _, other, _, _ in got), (
                f"takes no {'*' if kind == 'VAR_POSITIONAL' else '**'}{name}"
            )
            continue
        assert name in ours, f"no parameter {name!r}" + (" (only **kwargs)" if open_keywords else "")
        own_kind, own_default, own_required = ours[name]
        assert own_kind == kind, f"{name!r} is {own_kind}, wanted {kind}"
        if not required:
            assert not own_required, f"{name!r} has no default"
            assert own_default == default, f"{name!r} has the default {own_default!r}, wanted {default!r}"

    def by_place(parameters: list[list[Any]]) -> list[str]:
        return [name for name, kind, _, _ in parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]

    assert by_place(got)[: len(by_place(wanted))] == by_place(wanted), "another order"
    extra = [name for name, _, _, required in got if required and name not in {row[0] for row in wanted}]
    names = {row[0] for row in got if row[1].startswith("VAR_")}
    assert [name for name in extra if name not in names] == [], "further parameters must have a default"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_signature(lab: Lab, name: str) -> None:
    got, wanted = described(lab, name)
    assert got["kind"] in ("function", "class")
    check_parameters(got["parameters"], wanted["parameters"])


@pytest.mark.parametrize("name", MEMBERS)
def test_member(lab: Lab, name: str) -> None:
    """A property stays a property, a value keeps its value, a method accepts the peer's calls."""
    got, wanted = described(lab, name)
    assert got["kind"] == wanted["kind"]
    if wanted["kind"] == "value":
        assert got["value"] == wanted["value"]
    elif "parameters" in wanted:
        check_parameters(got["parameters"], wanted["parameters"])


@pytest.mark.parametrize("name", CLASSES)
def test_class_bases(lab: Lab, name: str) -> None:
    got, wanted = (set(told.get("bases", ())) & TELLING_BASES for told in described(lab, name))
    assert wanted - got == set()
    # Modules trained in full are BaseTunerLayers here, so that transformers' enable_adapters() reaches them too; whatever
    # programs call on every such layer does nothing on them.
    if "BaseTunerLayer" in got - wanted:
        assert name.endswith("Wrapper")


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Config")])
def test_config_fields_and_defaults(lab: Lab, name: str) -> None:
    got, wanted = described(lab, name)
    assert {field: dict(got["fields"]).get(field, "missing") for field, _ in wanted["fields"]} == dict(wanted["fields"])


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Config")])
def test_config_arguments(lab: Lab, name: str) -> None:
    got, wanted = described(lab, name)
    factory = "<factory>"  # the default's value is compared field by field
    check_parameters(
        [[n, k, None if factory in repr(d) else d, r] for n, k, d, r in got["parameters"]],
        [[n, k, None if factory in repr(d) else d, r] for n, k, d, r in wanted["parameters"]],
    )


@pytest.mark.parametrize("name", ["peft.PeftType", "peft.TaskType"])
def test_enum_members(lab: Lab, name: str) -> None:
    got, wanted = described(lab, name)
    assert {member: got["members"].get(member) for member in wanted["members"]} == wanted["members"]


@pytest.mark.parametrize("name", VALUES)
def test_value(lab: Lab, name: str) -> None:
    """Tables may have further rows."""
    got, wanted = described(lab, name)
    value, reference = got["value"], wanted["value"]
    if isinstance(reference, dict):
        value = {key: value.get(key) for key in reference}
    assert value == reference


def test_every_method_of_the_peer_is_a_known_type(lab: Lab) -> None:
    """An adapter of a method that is not built must be refused by name, so its type has to be known."""
    got, wanted = described(lab, "peft.PeftType")
    assert set(wanted["members"]) - set(got["members"]) == set()


def test_the_oracles_are_what_they_should_be(lab: Lab) -> None:
    answers = lab.ask("hello")
    assert answers["peer"]["peft"].startswith("0.21."), "these tests are written for the peer's 0.21"
    for library in ("torch", "transformers"):
        assert answers["ours"][library].split("+")[0] == answers["peer"][library].split("+")[0], library
