"""What is LoRA's own: ranks, scales, starts, and fields that are not built."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import tiny
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer


def model(**options):
    return get_peft_model(tiny.LLAMA.build(), LoraConfig(target_modules=["q_proj", "v_proj"], **options))


def layer(model, name="q_proj", number=0) -> LoraLayer:
    return getattr(model.base_model.model.model.layers[number].self_attn, name)


def test_ranks_and_alphas_by_pattern():
    adapted = model(
        r=4,
        lora_alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 6},
        alpha_pattern={"layers.1.self_attn.v_proj": 12},
    )
    assert layer(adapted, "q_proj").r == {"default": 2}
    assert layer(adapted, "v_proj", 0).r == {"default": 4}
    assert layer(adapted, "v_proj", 1).r == {"default": 6}
    assert layer(adapted, "v_proj", 1).scaling == {"default": 2.0}
    assert layer(adapted, "q_proj").scaling == {"default": 4.0}
    assert layer(adapted, "q_proj").lora_A["default"].weight.shape == (2, 32)


def test_the_output_is_that_of_the_formula():
    adapted = model(r=4, lora_alpha=6, use_rslora=True)
    one = layer(adapted)
    assert one.scaling["default"] == pytest.approx(6 / math.sqrt(4))
    nn.init.normal_(one.lora_B["default"].weight)
    x = torch.randn(2, 5, 32)
    a, b = one.lora_A["default"].weight, one.lora_B["default"].weight
    expected = x @ one.base_layer.weight.T + 3.0 * (x @ a.T) @ b.T
    torch.testing.assert_close(one(x), expected)
    torch.testing.assert_close(one.get_delta_weight("default"), 3.0 * b @ a)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_starts_are_the_identity_and_as_documented(start):
    torch.manual_seed(0)
    adapted = get_peft_model(
        nn.Sequential(nn.Linear(2000, 30)), LoraConfig(r=16, target_modules=["0"], init_lora_weights=start)
    )
    a, b = (getattr(adapted.base_model.model[0], f"lora_{n}")["default"].weight for n in "AB")
    assert not b.any()
    if start == "gaussian":
        assert a.std().item() == pytest.approx(1 / 16, rel=0.05)
    else:
        bound = math.sqrt(1 / 2000)  # Kaiming uniform with a = sqrt(5)
        assert a.abs().max() <= bound and a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_random_start_is_no_identity():
    adapted = get_peft_model(
        nn.Sequential(nn.Linear(20, 30)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    assert adapted.base_model.model[0].lora_B["default"].weight.abs().sum() > 0


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 8, bias=False))
    plain[0].weight.data.zero_()
    adapted = get_peft_model(plain, LoraConfig(r=8, target_modules=["0"], lora_dropout=0.4))
    nn.init.normal_(adapted.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(1, 64)
    adapted.eval()
    exact = adapted(x)
    assert torch.equal(adapted(x), exact)
    adapted.train()
    mean = torch.stack([adapted(x) for _ in range(4000)]).mean(0)
    assert (mean - exact).abs().max() < 0.1 * exact.abs().max() + 0.05
    assert not torch.equal(adapted(x), adapted(x))


FIELDS = {
    "use_qalora": True, "target_parameters": ["x"],
    "alora_invocation_tokens": [1], "megatron_config": {"a": 1},
    "loftq_config": {"a": 1}, "eva_config": object(), "corda_config": object(), "lora_ga_config": object(),
    "velora_config": object(), "monteclora_config": object(), "use_bdlora": object(), "arrow_config": object(),
    "kasa_config": object(), "init_lora_weights": "eva",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_are_not_built_are_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=name):
        LoraConfig(**{name: FIELDS[name]})


def test_no_field_is_ignored():
    """Each field is either refused above when set, or has a test or a meaning elsewhere."""
    built = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
        "num_labels", "id2label", "problem_type", "layer_replication", "trainable_token_indices", "ensure_weight_tying",
    }  # fmt: skip
    only_with_others = {
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }  # no effect unless a refused field is set
    assert {f.name for f in dataclasses.fields(LoraConfig)} == built | only_with_others | (
        set(FIELDS) - {"init_lora_weights"}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer"),
        ({"r": "8"}, "`r` should be an integer"),
        ({"r": True}, "`r` should be an integer"),
        ({"lora_alpha": "x"}, "`lora_alpha` should be a number"),
        ({"lora_dropout": 1.5}, "`lora_dropout` is a probability"),
        ({"bias": "some"}, "`bias` should be 'none', 'all' or 'lora_only'"),
        ({"rank_pattern": [1]}, "`rank_pattern` should be a dictionary or None"),
        ({"target_modules": 3}, "`target_modules` should be a list of strings, a string or None"),
        ({"task_type": "CAUSAL"}, "Unknown task_type 'CAUSAL'"),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_a_bad_pattern_value_names_the_module():
    with pytest.raises(
        ValueError, match="Cannot adapt 'model.layers.0.self_attn.q_proj': the rank should be a positive integer"
    ):
        model(rank_pattern={"q_proj": 0})


def test_a_wrong_fan_in_fan_out_is_corrected_with_a_warning():
    with pytest.warns(UserWarning, match="fan_in_fan_out is False, but the target .* is a Conv1D"):
        config = LoraConfig(target_modules=["c_attn"])
        get_peft_model(tiny.GPT2.build(), config)
    assert config.fan_in_fan_out is True


def test_numbers_and_printing(capsys):
    adapted = model(r=2, task_type=TaskType.CAUSAL_LM)
    adapted.print_trainable_parameters()
    trainable, total = adapted.get_nb_trainable_parameters()
    assert trainable == 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert (
        capsys.readouterr().out
        == f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )
    assert "lora.Linear(" in repr(adapted)


def test_status():
    adapted = model(r=2)
    status = adapted.get_model_status()
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == (
        "LlamaForCausalLM",
        "LoraModel",
        {"default": "LORA"},
    )
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 4)
    layer(adapted).merge()
    assert adapted.get_model_status().merged_adapters == "irregular"
    first = adapted.get_layer_status()[0]
    assert (first.name, first.module_type, first.devices) == (
        "model.model.layers.0.self_attn.q_proj",
        "lora.Linear",
        {"default": ["cpu"]},
    )
    assert first.merged_adapters == ["default"]
    with pytest.raises(ValueError, match="No adapter layers found"):
        from peft import get_layer_status

        get_layer_status(tiny.LLAMA.build())
