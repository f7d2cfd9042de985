"""Which modules a configuration means, and what is said where it means none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model, inject_adapter_in_model
from peft.core.holder import adapted_modules
from peft.core.targets import shortest_names


def adapted(base=tiny.LLAMA, **options):
    model = inject_adapter_in_model(LoraConfig(**options), base.build())
    return {name for name, _ in adapted_modules(model)}


def layers(*names, numbers=(0, 1)):
    return {f"model.layers.{i}.{n}" for i in numbers for n in names}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, layers("self_attn.q_proj")),
        ({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}, layers("self_attn.q_proj", "mlp.up_proj")),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, layers("self_attn.q_proj", numbers=[0])),
        ({"target_modules": r".*\.1\..*(up|down)_proj"}, layers("mlp.up_proj", "mlp.down_proj", numbers=[1])),
        ({}, layers("self_attn.q_proj", "self_attn.v_proj")),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            layers("self_attn.q_proj", "self_attn.v_proj") - layers("self_attn.q_proj", numbers=[0]),
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
            layers("self_attn.q_proj", "self_attn.v_proj", numbers=[1]),
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, layers("self_attn.q_proj", numbers=[1])),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, layers("self_attn.q_proj")),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            layers("self_attn.q_proj", numbers=[0]),
        ),
    ],
)
def test_targets(options, expected):
    assert adapted(**options) == expected


def test_all_linear_means_every_linear_layer_but_the_head():
    model = tiny.LLAMA.build()
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    config = LoraConfig(target_modules="all-linear")
    inject_adapter_in_model(config, model)
    assert {n for n, _ in adapted_modules(model)} == linear
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    classifier = get_peft_model(tiny.BERT.build(), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert not any("classifier.lora" in n for n, _ in classifier.named_parameters())
    gpt2 = inject_adapter_in_model(LoraConfig(target_modules="all-linear"), tiny.GPT2.build())
    assert len(list(adapted_modules(gpt2))) == 2 * 4


def test_shortest_names_mean_exactly_the_modules_found():
    names = ["a.x", "b.x", "b.y", "c.y"]
    assert shortest_names(["a.x", "b.x", "b.y"], names) == {"x", "b.y"}


def test_nothing_matches():
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        adapted(target_modules=["q_prj"])
    message = str(caught.value)
    assert "q_prj" in message and "did you mean 'q_proj'" in message and "gate_proj" in message
    assert isinstance(caught.value, ValueError)


def test_one_of_several_matches_nothing(monkeypatch):
    with pytest.warns(UserWarning, match=r"match no module.*'v_prj' \(did you mean 'v_proj'"):
        assert adapted(target_modules=["q_proj", "v_prj"]) == layers("self_attn.q_proj")
    with pytest.raises(ValueError, match="v_prj"):
        get_peft_model(tiny.LLAMA.build(), LoraConfig(target_modules=["q_proj", "v_prj"]), strict=True)
    monkeypatch.setenv("PEFT_STRICT", "1")
    model = tiny.LLAMA.build()
    with pytest.raises(ValueError, match="v_prj"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_prj"]))
    assert not list(adapted_modules(model))


def test_an_exclusion_that_matches_nothing_or_everything():
    with pytest.warns(UserWarning, match="exclude_modules 'k_prj' match none"):
        adapted(target_modules=["q_proj"], exclude_modules=["k_prj"])
    with pytest.raises(ValueError, match="all matches of target_modules 'q_proj' are excluded"):
        adapted(target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_layers_that_do_not_exist():
    with pytest.raises(ValueError, match=r"none in the layers_to_transform \[7\]"):
        adapted(target_modules=["q_proj"], layers_to_transform=[7])
    with pytest.raises(ValueError, match="`layers_pattern` has no effect without"):
        LoraConfig(target_modules=["q_proj"], layers_pattern="layers")
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a regular expression"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=[0])


def test_models_without_defaults():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

    with pytest.raises(ValueError, match="Please specify `target_modules`.*Odd"):
        get_peft_model(Odd(), LoraConfig())
    model = tiny.LLAMA.build()
    model.config.model_type = "llamma"
    with pytest.raises(ValueError, match="type 'llamma'.*'llama'"):
        get_peft_model(model, LoraConfig())


def test_layers_that_cannot_be_adapted():
    with pytest.raises(ValueError, match="'model.norm' is a LlamaRMSNorm.*Supported kinds.*Linear"):
        adapted(target_modules=["q_proj", "model.norm"])
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="inside nn.MultiheadAttention"):
        get_peft_model(attention, LoraConfig(target_modules=["out_proj"]))


def test_targets_inside_a_module_that_is_trained_in_full():
    options = {"target_modules": ["query", "classifier"], "modules_to_save": ["classifier"]}
    with pytest.warns(UserWarning, match="'classifier' lie inside modules_to_save"):
        model = inject_adapter_in_model(LoraConfig(**options), tiny.BERT.build())
    assert type(model.classifier).__name__ == "ModulesToSaveWrapper"
    with pytest.raises(ValueError, match="All target modules"):
        inject_adapter_in_model(
            LoraConfig(target_modules=["classifier"], modules_to_save=["classifier"]), tiny.BERT.build()
        )


def test_modules_to_save_that_do_not_exist():
    with pytest.warns(UserWarning, match=r"modules_to_save match no module.*'lm_hed' \(did you mean 'lm_head'"):
        inject_adapter_in_model(LoraConfig(modules_to_save=["lm_hed"]), tiny.LLAMA.build())


def test_a_state_dict_names_the_layers():
    source = get_peft_model(tiny.LLAMA.build(), LoraConfig(target_modules=["o_proj"]))
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(source)
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny.LLAMA.build(), state_dict=state)
    assert {n for n, _ in adapted_modules(model)} == layers("self_attn.o_proj")
    with pytest.raises(ValueError, match="does not have: 'nowhere'"):
        inject_adapter_in_model(
            LoraConfig(), tiny.LLAMA.build(), state_dict={"nowhere.lora_A.weight": torch.zeros(8, 32)}
        )
    with pytest.raises(ValueError, match="no tensors of this method"):
        inject_adapter_in_model(LoraConfig(), tiny.LLAMA.build(), state_dict={"nowhere": torch.zeros(8, 32)})
