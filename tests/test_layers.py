"""Layers out of the ordinary: quantised, tied, nested, directly read; and extra modules trained in full."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.core.holder import adapted_modules
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from settings import logits, randomise
from toy import DiagScaleConfig


class Int8Linear(nn.Module):
    """A made-up quantised layer: int8 weight, one scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Net(nn.Module):
    def __init__(self, quantised=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        if quantised:
            self.first = Int8Linear(self.first)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_quantised_base_is_adapted_but_not_merged():
    plain = Net(quantised=True)
    x = torch.randn(5, 6)
    expected = plain(x)
    model = get_peft_model(Net(quantised=True), LoraConfig(target_modules=["first"]))
    assert torch.equal(model(x), expected)
    randomise(model)
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == torch.float32
    hidden = torch.tanh(plain.first(x) + x @ a.T @ b.T * layer.scaling["default"])
    torch.testing.assert_close(model(x), plain.second(hidden))
    model(x).sum().backward()
    assert b.grad.abs().sum() > 0
    weights = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError,
            match="Cannot merge 'default' into '.*first': its weight is no plain float matrix but torch.int8",
        ):
            merge()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert type(model.unload().first) is Int8Linear


def test_merging_into_tied_weights_is_refused_before_anything_changes():
    model = tiny.LLAMA.build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="its weight is tied .*lm_head.weight.*tie_word_embeddings"):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.get_model_status().merged_adapters == []


def test_methods_nest_on_one_layer_and_switch_separately():
    base = tiny.LLAMA
    model = get_peft_model(base.build(), LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    model.add_adapter("scaled", DiagScaleConfig(target_modules=["q_proj"]))
    randomise(model, "default")
    randomise(model, "scaled")
    only_lora = get_peft_model(base.build(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    randomise(only_lora)
    assert torch.equal(logits(model, base), logits(only_lora, base))
    only_toy = get_peft_model(base.build(), DiagScaleConfig(target_modules=["q_proj"]))
    only_toy.peft_config["default"].task_type = None
    from peft import set_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name="scaled")
    assert not any("base_layer" in k for k in state)
    assert not set_peft_model_state_dict(only_toy, state).unexpected_keys
    model.set_adapter("scaled")
    torch.testing.assert_close(logits(model, base), logits(only_toy, base))
    model.set_adapter(["default", "scaled"])
    both = logits(model, base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, base), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, base), both)
    mixed = logits(model, base, adapter_names=["default", "scaled", "__base__", "default"])
    assert mixed.isfinite().all()


def test_nested_methods_save_and_load_each_in_its_own_file(tmp_path):
    base = tiny.LLAMA
    model = get_peft_model(base.build(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("scaled", DiagScaleConfig(target_modules=["q_proj"]))
    randomise(model, "default")
    randomise(model, "scaled")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.build(), tmp_path)
    loaded.load_adapter(tmp_path / "scaled", "scaled")
    for name in ("default", "scaled"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(model, base), logits(loaded, base))
    reverse = PeftModel.from_pretrained(base.build(), tmp_path / "scaled", adapter_name="scaled")
    reverse.load_adapter(tmp_path, "default")
    reverse.set_adapter("default")
    model.set_adapter("default")
    assert torch.equal(logits(model, base), logits(reverse, base))


def test_modules_to_save_are_trained_saved_and_restored(tmp_path):
    base = tiny.LLAMA
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model = get_peft_model(base.build(), config)
    assert torch.equal(logits(model, base), logits(base.build(), base))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
    }
    randomise(model)
    expected = logits(model, base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(logits(loaded, base), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, base), logits(base.build(), base))
    assert model.base_model.model.lm_head.weight is model.base_model.model.lm_head.modules_to_save["default"].weight
    merged = model.merge_and_unload()
    assert isinstance(merged.lm_head, nn.Linear)
    torch.testing.assert_close(logits(merged, base), expected, atol=1e-5, rtol=1e-4)


def test_scaling_of_layers():
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"], r=4, lora_alpha=8))
    layer = model.base_model.model.first
    assert layer.scaling == {"default": 2.0}
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == 1.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer()
    with rescale_adapter_scale(model, 0.25):
        assert layer.scaling["default"] == 0.5
    assert layer.scaling["default"] == 2.0
    with pytest.raises(TypeError, match="should be a number"), rescale_adapter_scale(model, "2"):
        pass
    with pytest.raises(ValueError, match="no adapters with a scaling"), rescale_adapter_scale(Net(), 2):
        pass


def test_input_casting_can_be_switched_off():
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"])).to(torch.bfloat16)
    layer = model.base_model.model.first
    x = torch.randn(2, 6, dtype=torch.float32)
    assert layer.cast_input(x, torch.bfloat16).dtype == torch.bfloat16
    with disable_input_dtype_casting(model):
        assert layer.cast_input(x, torch.bfloat16).dtype == torch.float32
    assert layer.cast_input_dtype_enabled


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_and_are_saved(bias, tmp_path):
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"], bias=bias))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    expected = {"base_model.model.first.base_layer.bias"} | (
        {"base_model.model.second.bias"} if bias == "all" else set()
    )
    assert trained == expected
    randomise(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 6)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))
    with pytest.warns(UserWarning, match="trained biases of the base model"):
        model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    with pytest.raises(ValueError, match="Only one adapter of a model can train biases"):
        model.add_adapter("second", LoraConfig(target_modules=["first"], bias=bias))


@pytest.mark.parametrize("targets", [["query_proj", "value_proj"], ["value_proj"]])
def test_positions_that_deberta_computes_once_for_all_rows_take_one_adapter(targets):
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    base = DebertaV2Model(
        DebertaV2Config(
            **sizes, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8
        )
    )
    model = get_peft_model(base, LoraConfig(target_modules=targets), "a").eval()
    model.add_adapter("b", LoraConfig(target_modules=targets))
    for seed, name in enumerate("ab"):
        randomise(model, name, seed)
    ids = torch.randint(3, 64, (3, 7))

    def output(**arguments):
        with torch.no_grad():
            return model(input_ids=ids, **arguments).last_hidden_state

    alone = {}
    for name in "ab":
        model.set_adapter(name)
        alone[name] = output()
    assert (alone["a"] - alone["b"]).abs().max() > 1e-3
    torch.testing.assert_close(output(adapter_names=["a"] * 3), alone["a"])
    if "query_proj" in targets:
        with pytest.raises(ValueError, match="relative positions once for all rows"):
            output(adapter_names=["a", "b", "__base__"])
        torch.testing.assert_close(output(adapter_names=["b"] * 3), alone["b"])  # nothing is left behind
    else:
        torch.testing.assert_close(
            output(adapter_names=["a", "b", "a"])[:2], torch.stack([alone["a"][0], alone["b"][1]])
        )


def test_row_wise_inputs_that_do_not_fit_a_mixed_batch_are_errors():
    class Regrouping(Net):
        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))[: x.shape[0] - 1]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()

        def forward(self, x):
            return self.body(x[:3])

    model = get_peft_model(Wrapped(), LoraConfig(target_modules=["first"])).eval()
    with pytest.raises(ValueError, match="has 4 names, but a layer of type Linear sees 3 rows"):
        model(torch.randn(4, 6), adapter_names=["default"] * 4)


def test_the_frozen_head_of_a_classifier_is_warned_about(tmp_path):
    from transformers import BertForSequenceClassification, BertModel

    BertModel(tiny.BERT.build().config).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="head 'classifier' .* stays frozen.*task_type='SEQ_CLS'"):
        get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="stays frozen"):
        get_peft_model(
            BertForSequenceClassification.from_pretrained(tmp_path), LoraConfig(target_modules=["query"]), strict=True
        )
    tiny.BERT.build().save_pretrained(tmp_path)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(BertForSequenceClassification.from_pretrained(tmp_path), LoraConfig(target_modules=["query"]))


def test_injected_models_take_one_more_adapter():
    model = inject_adapter_in_model(LoraConfig(target_modules=["first"]), Net())
    inject_adapter_in_model(LoraConfig(target_modules=["second"]), model, "other")
    assert sorted(model.peft_config) == ["default", "other"]
    assert {n: m.active_adapters for n, m in adapted_modules(model)} == {"first": ["other"], "second": ["other"]}
