"""What methods need that work on whole modules: blocks that keep their names, inputs read elsewhere, shared parameters."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.config import WeightConfig
from peft.core.holder import adapted_modules
from peft.core.kinds import kind_of
from peft.core.layer import AdapterLayer
from peft.core.targets import base_modules
from peft.core.tuner import BaseTuner
from peft.registry import register_method


@dataclass
class MixInConfig(WeightConfig):
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    source: str | None = None

    def __post_init__(self):
        self.peft_type = "MIX_IN"
        super().__post_init__()


class MixInLayer(AdapterLayer):
    """y + a · x + b: a is one number for all layers, b one vector for each."""

    parameter_slots = ("mix_a", "mix_b")
    shared_slots = ("mix_a",)
    why_no_merge = "a toy"
    attached_as = "mix"

    def input_of(self, config, target):
        return config.source and f"{target.rpartition('.')[0]}.{config.source}"

    def shapes(self, config, settings):
        return {"mix_a": (1,), "mix_b": (self.out_features,)}

    def start(self, tensors, config, settings):
        for tensor in tensors.values():
            tensor.zero_()

    def after(self, name, x, y, earlier=()):
        return y + self.shared("mix_a", name) * x + self.mix_b[name]


class MixInModel(BaseTuner):
    layer_cls = MixInLayer


register_method("MIX_IN", config_cls=MixInConfig, tuner_cls=MixInModel)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, *, flag=None):
        return x + self.second(torch.tanh(self.first(self.norm(x)))), flag


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x, flag = block(x, flag="kept")
            assert flag == "kept"
        return x


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def set_values(model, a, b, adapter="default"):
    with torch.no_grad():
        for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items():
            tensor.fill_(a if key.endswith("mix_a") else b)


def expected(a, b):
    x = X
    for block in Net().blocks:
        x = block(x)[0] + a * x + b
    return x


def test_a_block_keeps_its_names_and_what_else_it_gives():
    plain = Net()
    model = get_peft_model(Net(), MixInConfig(target_modules=r"blocks\.\d"))
    assert torch.equal(model(X), plain(X))
    raw = model.get_base_model()
    assert set(plain.state_dict()) <= set(raw.state_dict())
    assert type(raw.blocks[0]) is Block
    assert set(base_modules(raw)) == {n for n, _ in plain.named_modules() if n}
    set_values(model, 0.5, 0.25)
    torch.testing.assert_close(model(X), expected(0.5, 0.25))
    with model.disable_adapter():
        assert torch.equal(model(X), plain(X))


def test_other_methods_reach_into_a_block_and_their_files_keep_their_keys():
    model = get_peft_model(Net(), MixInConfig(target_modules=r"blocks\.\d"))
    model.add_adapter("low", LoraConfig(target_modules=["second"]))
    keys = get_peft_model_state_dict(model, adapter_name="low")
    assert set(keys) == set(get_peft_model_state_dict(get_peft_model(Net(), LoraConfig(target_modules=["second"]))))
    set_values(model, 0.5, 0.25)
    with torch.no_grad():
        for tensor in keys.values():
            tensor.normal_(std=0.3)
    model.base_model.set_adapter(["default", "low"])
    both = model(X)
    model.merge_adapter(["low"])  # the block's adapter is no obstacle: it works on what the block gives
    torch.testing.assert_close(model(X), both)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="Cannot merge 'default' into .*: a toy"):
        model.merge_adapter(["default"])


def test_an_adapter_that_cannot_be_merged_below_another_stops_its_merging():
    model = get_peft_model(Net(), MixInConfig(target_modules=["norm"]))
    inject_adapter_in_model(LoraConfig(target_modules=["second"]), model.get_base_model(), "low")
    inject_adapter_in_model(MixInConfig(target_modules=["second"], source="first"), model.get_base_model(), "above")
    model.base_model.set_adapter(["low", "above"])
    model.merge_adapter(["low"])  # it is the inner one: what lies above does not matter
    model.unmerge_adapter()
    other = get_peft_model(Net(), MixInConfig(target_modules=["norm"]))
    inject_adapter_in_model(MixInConfig(target_modules=["second"], source="norm"), other.get_base_model(), "below")
    inject_adapter_in_model(LoraConfig(target_modules=["second"]), other.get_base_model(), "low")
    other.base_model.set_adapter(["low", "below"])
    with pytest.raises(ValueError, match="an adapter between it and the weight, a MixInLayer, cannot be merged"):
        other.merge_adapter(["low"])
    other.base_model.set_adapter(["low"])
    other.merge_adapter(["low"])


def test_the_input_of_another_module_is_read_and_let_go():
    model = get_peft_model(Net(), MixInConfig(target_modules=["second"], source="norm"))
    set_values(model, 0.5, 0.25)
    x = X
    for block in Net().blocks:
        x = block(x)[0] + 0.5 * x + 0.25
    torch.testing.assert_close(model(X), x)
    layers = [m for _, m in adapted_modules(model)]
    assert all(not layer.attachment._seen for layer in layers)
    with model.disable_adapter():
        assert torch.equal(model(X), Net()(X))
    assert all(not layer.attachment._seen for layer in layers)
    # Rows of a mixed batch read their own rows.
    mixed = model.eval()(X, adapter_names=["default", "__base__", "default", "default"])
    torch.testing.assert_close(mixed, torch.where(torch.tensor([[0], [1], [0], [0]]).bool(), Net()(X), x))
    with pytest.raises(
        RuntimeError, match="should read the input of 'blocks.0.nothing', which the model does not have"
    ):
        get_peft_model(Net(), MixInConfig(target_modules=["second"], source="nothing"))


def test_an_input_that_comes_too_late_is_an_error():
    model = get_peft_model(Net(), MixInConfig(target_modules=["norm"], source="second"))
    with pytest.raises(RuntimeError, match="'blocks.0.second', which has not run before this layer"):
        model(X)


@pytest.mark.parametrize(
    "config",
    [{"target_modules": r"blocks\.\d"}, {"target_modules": ["second"], "source": "norm"}],
    ids=["block", "source"],
)
def test_unloading_copies_and_pickles(config):
    model = get_peft_model(Net(), MixInConfig(**config))
    set_values(model, 0.5, 0.25)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    outputs = model(X)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(X), outputs)
        set_values(twin, 1.0, 2.0)
        assert torch.equal(model(X), outputs)
        assert not torch.equal(twin(X), outputs)
        plain = twin.unload()
        assert set(plain.state_dict()) == set(Net().state_dict())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
        assert torch.equal(plain(X), Net()(X))
    assert torch.equal(model(X), outputs)


def test_a_shared_parameter_is_one_and_is_held_and_saved_once(tmp_path):
    model = get_peft_model(Net(), MixInConfig(target_modules=r"blocks\.\d"))
    keys = get_peft_model_state_dict(model)
    assert [k for k in keys if k.endswith("mix_a")] == ["base_model.model.blocks.0.mix.mix_a"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1 + 2 * 6
    set_values(model, 0.5, 0.25)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(X), model(X))
    loaded(X).sum().backward()
    rule = loaded.base_model.model.blocks[0].mix.mix_a["default"]
    assert all(m.shared("mix_a", "default") is rule for _, m in adapted_modules(loaded))
    loaded.load_adapter(tmp_path, "second")
    loaded.delete_adapter("default")
    loaded.set_adapter("second")
    torch.testing.assert_close(loaded(X), model(X))


def test_a_state_dict_names_the_blocks():
    state = get_peft_model_state_dict(get_peft_model(Net(), MixInConfig(target_modules=["blocks.1"])))
    model = inject_adapter_in_model(MixInConfig(target_modules=r"blocks\.\d"), Net(), state_dict=state)
    assert [n for n, _ in adapted_modules(model)] == ["blocks.1.mix"]


def test_containers_and_models_are_no_blocks():
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match="'blocks' is a ModuleList, which cannot be adapted"):
        get_peft_model(Net(), MixInConfig(target_modules=["blocks"]))
    model = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    )
    assert kind_of(model, any_module=True) is None
    assert kind_of(model.encoder.layer[0], any_module=True).shape(model.encoder.layer[0]) == (8, 8)
    with pytest.raises(ValueError, match="how wide its output is cannot be told"):
        kind_of(nn.Dropout(), any_module=True).shape(nn.Dropout())
    # A method that works on weights does not take them.
    with pytest.raises(ValueError, match="is a Block, which cannot be adapted"):
        get_peft_model(Net(), LoraConfig(target_modules=["blocks.0", "second"]))


def test_defaults_that_are_an_expression_become_names_where_layers_are_chosen(tmp_path):
    class Chosen(MixInModel):
        @classmethod
        def find_defaults(cls, config, model):
            return r"blocks\.\d"

    from peft.core.injection import inject

    config = MixInConfig(layers_to_transform=[1])
    inject(Net(), MixInConfig(), "default", Chosen)
    model = nn.ModuleDict({"body": Net()})

    class Inside(Chosen):
        @classmethod
        def find_defaults(cls, config, model):
            return r"body\.blocks\.\d\.second"

    inject(model, config, "default", Inside)
    assert config.target_modules == {"1.second"}
    config.save_pretrained(tmp_path)
    assert MixInConfig.from_pretrained(tmp_path) == config
