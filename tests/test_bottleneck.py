"""Bottleneck adapters: the formulas, where they sit in each model type, their options and their errors."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import tiny
from benchmarks.saved_bytes import saved_bytes
from peft import BottleneckConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.core.holder import adapted_modules
from peft.core.targets import base_modules, match
from peft.helpers import recompute_inputs
from peft.tuners.bottleneck.places import PLACES
from settings import logits, randomise
from test_prompt_architectures import TABLE, Row, ids_of, inputs_of
from tiny_architectures import build_on_meta


class Net(nn.Module):
    """One feed-forward layer that is normalised after the residual sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.fc2(torch.relu(self.fc1(x))))


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def adapted(adapter="default", **options):
    options.setdefault("bottleneck_dim", 4)
    model = get_peft_model(Net(), BottleneckConfig(**options), adapter)
    randomise(model, adapter, scale=0.5)
    return model.eval()


def parts(model, adapter="default"):
    """Tensors by slot of the only adapted layer."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {re.sub(r".*bottleneck_", "", key).removesuffix(".weight"): t for key, t in state.items()}


def network(p, z, f=torch.relu):
    return F.linear(f(F.linear(z, p["down"], p["down_bias"])), p["up"], p["up_bias"])


# the formulas ------------------------------------------------------------------------------------------------------


def test_after_a_linear_layer():
    model, net = adapted(placement="houlsby", target_modules=["fc2"], non_linearity="silu"), Net()
    y = net.fc2(torch.relu(net.fc1(X)))
    wanted = net.norm(X + y + network(parts(model), y, F.silu))
    torch.testing.assert_close(model(X), wanted)


def test_after_a_norm_which_runs_again():
    net = Net()
    u = X + net.fc2(torch.relu(net.fc1(X)))
    model = adapted(target_modules=["norm"])
    torch.testing.assert_close(model(X), net.norm(u + network(parts(model), net.norm(u))))
    model = adapted(target_modules=["norm"], original_ln_after=False)
    torch.testing.assert_close(model(X), net.norm(u) + network(parts(model), net.norm(u)))


def test_several_on_one_norm_are_stacked_in_order():
    net, model = Net(), adapted("one", target_modules=["norm"])
    model.add_adapter("two", BottleneckConfig(target_modules=["norm"], bottleneck_dim=3))
    randomise(model, "two", 5, scale=0.5)
    model.base_model.set_adapter(["one", "two"])
    u = X + net.fc2(torch.relu(net.fc1(X)))
    u = u + network(parts(model, "one"), net.norm(u))
    u = u + network(parts(model, "two"), net.norm(u))
    torch.testing.assert_close(model(X), net.norm(u))


def test_beside_a_layer_and_beside_a_network_of_two_layers():
    net, options = Net(), {"placement": "parallel", "target_modules": ["fc2"], "scaling": 4.0}
    h = torch.relu(net.fc1(X))
    model = adapted(**options)
    torch.testing.assert_close(model(X), net.norm(X + net.fc2(h) + 4 * network(parts(model), h)))
    model = adapted(**options, input_modules={"(.*)fc2": r"\1fc1"})
    assert parts(model)["down"].shape == (4, 8)
    torch.testing.assert_close(model(X), net.norm(X + net.fc2(h) + 4 * network(parts(model), X)))


def test_the_further_parts():
    net, names = Net(), ["fc2"]
    y = net.fc2(torch.relu(net.fc1(X)))
    model = adapted(target_modules=names, ln_before=True, ln_after=True, use_gating=True, scaling="learned")
    p = parts(model)
    z = F.layer_norm(y, (8,), *p["norm_before"])
    change = network(p, z) * p["scale"] * torch.sigmoid(F.linear(z, p["gate"], p["gate_bias"]))
    torch.testing.assert_close(model(X), net.norm(X + y + F.layer_norm(change, (8,), *p["norm_after"])))


def test_dropout_acts_in_training_only():
    model = adapted(target_modules=["fc2"], dropout=0.5)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_compacter_is_a_sum_of_kronecker_products(rank, shared):
    model = adapted(target_modules=["fc2"], phm_dim=2, phm_rank=rank, phm_shared=shared)
    layer = model.base_model.model.fc2
    p = parts(model)
    rules = (p["phm_shared_rule"],) * 2 if shared else p["phm_rule"]
    for way, rule, found in zip(("down", "up"), rules, layer.projections("default"), strict=True):
        factor = p[f"phm_{way}_left"]
        factor = factor if rank is None else factor @ p[f"phm_{way}_right"]
        wanted = sum(torch.kron(a, b) for a, b in zip(rule, factor, strict=True))
        torch.testing.assert_close(found.T, wanted)
    y = Net().fc2(torch.relu(Net().fc1(X)))
    down, up = layer.projections("default")
    torch.testing.assert_close(model(X), Net().norm(X + y + network({**p, "down": down, "up": up}, y)))


def test_the_rule_of_compacter_is_one_for_all_layers(tmp_path):
    base = tiny.LLAMA
    model = get_peft_model(base.build(), BottleneckConfig(placement="houlsby", phm_dim=2))
    rules = [k for k in get_peft_model_state_dict(model) if k.endswith("rule")]
    assert rules == ["base_model.model.model.layers.0.self_attn.o_proj.bottleneck_phm_shared_rule"]
    own = 2 * 2 * (34 + 2 * 34)  # layers × places × (biases, then left and right factors of down and of up)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == own + 8
    randomise(model)
    model(**base.inputs()).logits.sum().backward()
    rule = next(p for n, p in model.named_parameters() if "shared_rule" in n)
    assert rule.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.build(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, base), logits(model, base))


def test_starts():
    model = get_peft_model(Net(), BottleneckConfig(target_modules=["fc2"], bottleneck_dim=4))
    assert torch.equal(model(X), Net()(X))
    assert parts(model)["down"].abs().max() <= 8**-0.5
    near = get_peft_model(Net(), BottleneckConfig(target_modules=["fc2"], bottleneck_dim=4, init="bert"))
    assert 0 < (near(X) - Net()(X)).abs().max() < 0.02
    assert 0.005 < parts(near)["up"].std() < 0.04


@pytest.mark.parametrize("options", [{"target_modules": ["norm"]}, {"target_modules": ["fc2"], "ln_before": True}])
def test_what_a_norm_gives_is_not_kept(options):
    x, found = X.clone().requires_grad_(), {}
    for enabled in (False, True):
        model = adapted(**options)
        with recompute_inputs(enabled):
            y = model(x)
            kept = saved_bytes(y, model.parameters())
            y.square().sum().backward()
        found[enabled] = kept, [p.grad for p in model.parameters() if p.requires_grad]
    assert found[True][0] == found[False][0] - X.numel() * 4
    for got, wanted in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(got, wanted)


# where they sit ----------------------------------------------------------------------------------------------------

DECODER_TOO = {"t5", "mt5", "umt5", "bart", "mbart"}


@pytest.mark.parametrize("model_type", sorted(PLACES))
def test_the_places_exist_once_in_each_layer(model_type):
    model = build_on_meta(model_type)
    modules = base_modules(model)
    config = model.config
    layers = config.num_hidden_layers
    if model_type in DECODER_TOO:
        layers += config.decoder_layers if hasattr(config, "decoder_layers") else config.num_decoder_layers
    for placement, per_layer in (("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)):
        places = [n for n in modules if match(PLACES[model_type].targets(placement), n)]
        assert len(places) == per_layer * layers, (placement, places[:4])
        if placement == "parallel":
            for name in places if PLACES[model_type].inputs else ():
                source = next(re.fullmatch(k, name).expand(v) for k, v in PLACES[model_type].inputs.items())
                assert source in modules


VIT = Row(
    "ViT",
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4},
    "image",
)  # fmt: skip


@pytest.mark.parametrize("row", [*TABLE, VIT], ids=lambda row: row.name)
def test_every_place_of_the_defaults_is_reached(row):
    """Built with weights and run: a fresh adapter changes nothing, and each of its tensors has a gradient, in every layer."""
    if row is VIT:
        torch.manual_seed(0)
        base = ViTForImageClassification(ViTConfig(**row.values)).eval()
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        base, inputs = row.build(), inputs_of(row, ids_of())
    if base.config.model_type not in PLACES:
        with pytest.raises(ValueError, match="no default is known for models of type"):
            get_peft_model(base, BottleneckConfig())
        return
    with torch.no_grad():
        plain = base(**inputs).logits
    for placement, per_layer in (("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)):
        model = get_peft_model(base, BottleneckConfig(placement=placement, reduction_factor=8)).eval()
        layers = [m for _, m in adapted_modules(model)]
        assert len(layers) == per_layer * base.config.num_hidden_layers * (2 if row.kind == "encoder-decoder" else 1)
        assert torch.equal(model(**inputs).logits, plain)
        randomise(model)
        out = model(**inputs).logits
        assert (out - plain).abs().max() > 1e-3
        out.square().sum().backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())]
        assert not idle, (placement, idle)
        base = model.unload()


def test_patterns_choose_single_widths():
    config = BottleneckConfig(
        placement="houlsby", reduction_factor=8, bottleneck_dim_pattern={"o_proj": 3},
        reduction_factor_pattern={r"layers\.1\..*down_proj": 2},
    )  # fmt: skip
    model = get_peft_model(tiny.LLAMA.build(), config)
    found = {n.split(".", 2)[2]: m.bottleneck_shape["default"].dim for n, m in adapted_modules(model.base_model.model)}
    assert found == {"0.self_attn.o_proj": 3, "0.mlp.down_proj": 4, "1.self_attn.o_proj": 3, "1.mlp.down_proj": 16}


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("base", [tiny.BERT, tiny.LLAMA], ids=lambda b: b.name)
def test_chosen_layers_are_saved_and_loaded(placement, base, tmp_path):
    config = BottleneckConfig(placement=placement, layers_to_transform=[1], task_type=base.task_type)
    model = get_peft_model(base.build(), config)
    names = [n for n, m in adapted_modules(model) if hasattr(m, "bottleneck_down")]
    assert len(names) == (2 if placement == "houlsby" else 1)
    assert all(".1." in n for n in names)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(logits(loaded, base), logits(model, base))


def test_beside_lora_on_the_same_model():
    base = tiny.LLAMA
    model = get_peft_model(base.build(), BottleneckConfig(task_type="CAUSAL_LM")).eval()
    model.add_adapter("low", LoraConfig(target_modules=["q_proj", "down_proj"]))
    plain_keys = set(
        get_peft_model_state_dict(get_peft_model(base.build(), LoraConfig(target_modules=["q_proj", "down_proj"])))
    )
    assert set(get_peft_model_state_dict(model, adapter_name="low")) == plain_keys
    randomise(model)
    randomise(model, "low", 3)
    model.base_model.set_adapter(["default", "low"])
    both = logits(model, base)
    model.merge_adapter(["low"])
    torch.testing.assert_close(logits(model, base), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    plain = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert torch.equal(logits(plain, base), logits(base.build(), base))


# errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "pfeifer"}, r"`placement` should be .*, got 'pfeifer' \(str\). Did you mean 'pfeiffer'\?"),
        ({"non_linearity": "swihs"}, r"Unknown `non_linearity` 'swihs' \(did you mean 'swish'"),
        ({"non_linearity": "prelu"}, "'prelu' has trained parameters of its own"),
        ({"bottleneck_dim": 4, "reduction_factor": 2}, "not both"),
        ({"bottleneck_dim": 0}, "`bottleneck_dim` should be a positive integer, got 0"),
        ({"reduction_factor": -1}, "`reduction_factor` should be a positive number, got -1"),
        ({"dropout": 1.0}, "`dropout` is a probability"),
        ({"scaling": "learnt"}, "`scaling` should be a number or 'learned', got 'learnt'"),
        ({"init": "lora"}, "`init` should be 'mam_adapter' or 'bert', got 'lora'"),
        ({"input_modules": {"a": "b"}}, "`input_modules` has no effect with placement='pfeiffer'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_impossible_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["fc3"]}, r"'fc3' not found in the base model \(did you mean 'fc2' or 'fc1'\?\)"),
        ({"target_modules": ["nrom"]}, r"did you mean 'norm'"),
        (
            {"target_modules": ["fc2"], "phm_dim": 3},
            "Cannot adapt 'fc2': `phm_dim` 3 does not divide bottleneck_dim, 4",
        ),
        (
            {"target_modules": ["fc2"], "bottleneck_dim_pattern": {"fc2": 0}},
            "`bottleneck_dim` should be a positive integer",
        ),
        ({"target_modules": ["words"], "placement": "parallel"}, "beside an embedding would read indices"),
        (
            {"target_modules": ["fc2"], "placement": "parallel", "input_modules": {"fc2": "fc9"}},
            "it should read the input of 'fc9', which the model does not have",
        ),
        ({"target_modules": ["conv"]}, "the last dimension, which is not that of the channels of a Conv1d"),
        ({}, "no config.model_type to look up defaults for"),
    ],
    ids=["target", "norm", "phm", "pattern", "embedding", "input", "convolution", "defaults"],
)
def test_what_the_model_cannot_have(options, message):
    net = Net()
    net.words, net.conv = nn.Embedding(5, 8), nn.Conv1d(8, 8, 1)
    with pytest.raises((ValueError, RuntimeError), match=message):
        get_peft_model(net, BottleneckConfig(**{"bottleneck_dim": 4, **options}))
    assert set(net.state_dict()) == {*Net().state_dict(), "words.weight", "conv.weight", "conv.bias"}


def test_an_unknown_model_type_is_told_the_similar_ones():
    model = tiny.LLAMA.build()
    model.config.model_type = "llamma"
    with pytest.raises(ValueError, match="no default is known for models of type 'llamma'.*'llama'"):
        get_peft_model(model, BottleneckConfig())


def test_merging_says_why_not():
    model = adapted(target_modules=["fc2"])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="Cannot merge 'default' into '.*fc2': a bottleneck adapter is not linear"):
            merge()
