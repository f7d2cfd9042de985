"""What is IA³'s, LoHa's and LoKr's own: formulas, starts, patterns, dropout, bad values; and all methods on one model."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import tiny
from peft import (
    BottleneckConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.core.holder import adapted_modules
from peft.tuners.lokr import factorization
from settings import ia3, logits, randomise


def one_layer(config, rows=36, columns=24):
    """An adapted linear layer."""
    torch.manual_seed(0)
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(nn.Linear(columns, rows)), config)
    return model.base_model.model[0]


def random_layer(config):
    layer = one_layer(config)
    for parameter in layer.adapter_parameters("default"):
        nn.init.normal_(parameter)
    return layer


# formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, 16], ids=["through-factors", "through-weight"])
def test_loha_is_the_formula(r):
    layer = random_layer(LoHaConfig(r=r, alpha=3))
    w1_a, w1_b, w2_a, w2_b = (getattr(layer, f"hada_w{i}")["default"] for i in ("1_a", "1_b", "2_a", "2_b"))
    delta = (w1_a @ w1_b) * (w2_a @ w2_b) * 3 / r
    x = torch.randn(2, 50, 24)
    expected = layer.base_layer(x) + x @ delta.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    assert torch.linalg.matrix_rank(delta) == min(r * r, 24)


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"r": 2}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
        ({"r": 32}, {"lokr_w1", "lokr_w2"}),
        ({"r": 32, "decompose_both": True}, {"lokr_w1", "lokr_w2"}),
        ({"r": 1, "decompose_both": True}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
        ({"r": 1, "decompose_factor": 2}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    ],
)
def test_lokr_is_the_formula(options, slots):
    layer = random_layer(LoKrConfig(alpha=3, **options))
    parts = dict(layer.adapter_entries("default"))
    assert set(parts) == slots
    w1, w2 = (parts[n] if n in parts else parts[f"{n}_a"] @ parts[f"{n}_b"] for n in ("lokr_w1", "lokr_w2"))
    delta = torch.kron(w1, w2) * 3 / options["r"]
    assert delta.shape == (36, 24)
    x = torch.randn(2, 5, 24)
    expected = layer.base_layer(x) + x @ delta.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


@pytest.mark.parametrize("r", [1, 8], ids=["low-rank", "whole"])
def test_lokr_on_a_line_of_channels_orders_a_whole_factor_as_files_do(r):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(6, 12, 3, padding=1))
    layer = get_peft_model(net, LoKrConfig(target_modules=["0"], r=r, alpha=r)).base_model.model[0]
    parts = dict(layer.adapter_entries("default"))
    for parameter in parts.values():
        nn.init.normal_(parameter)
    if r == 8:  # torch pairs a matrix with the last two dimensions of w2
        delta = torch.kron(parts["lokr_w1"][None], parts["lokr_w2"]).reshape(12, 6, 3)
    else:
        w2 = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).view(4, 3, 3)
        delta = torch.kron(parts["lokr_w1"][..., None], w2)
    x = torch.randn(2, 6, 7)
    expected = layer.base_layer(x) + nn.functional.conv1d(x, delta, padding=1)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 2), nn.Conv2d(4, 6, (2, 1))], ids=["line", "plane"])
def test_gradients_of_the_effective_forms_are_those_of_the_outputs(config, layer):
    net = nn.Sequential(copy.deepcopy(layer).double())
    model = get_peft_model(net, config(target_modules=["0"], r=1, use_effective_conv2d=True), "a").double()
    own = [p for p in model.parameters() if p.requires_grad]
    assert any(n.endswith(("t1.a", "t2.a")) for n, _ in model.named_parameters())
    x = torch.randn(2, 4, *([3] * (layer.weight.dim() - 2)), dtype=torch.double)
    for parameter in own:
        nn.init.normal_(parameter)
    assert torch.autograd.gradcheck(lambda *_: model(x), own)


def test_the_split_of_single_modules_can_be_given(tmp_path):
    config = LoKrConfig(target_modules=["q_proj", "v_proj"], r=2, w1_shapes={r"layers\.1\.self_attn\.q_proj": [2, 16]})
    model = get_peft_model(BASE.build(), config).eval()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("q_proj.lokr_w1.default")}
    assert [*shapes.values()] == [(4, 4), (2, 16)]
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASE.build(), tmp_path)
    assert torch.equal(logits(loaded, BASE), logits(model, BASE))
    assert "w1_shapes" not in LoKrConfig().to_json_dict()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q_proj": [5, 4]}, r"w1 of shape \(5, 4\), which does not divide the layer's \(32, 32\)"),
        ({"q_proj": [0, 4]}, "is no pair of positive integers"),
        ({"q_proj": 4}, "is no pair of positive integers"),
        ({"(": [1, 1]}, "`w1_shapes` .*no regular expression|`w1_shapes`"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(shapes, message):
    model = BASE.build()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoKrConfig(target_modules=["q_proj"], w1_shapes=shapes))
    assert not hasattr(model, "peft_config")


def test_applying_lokr_builds_no_kronecker_product(monkeypatch):
    layer = random_layer(LoKrConfig(r=2))
    monkeypatch.setattr(torch, "kron", lambda *args: pytest.fail("built the Kronecker product"))
    layer(torch.randn(3, 24)).sum().backward()


@pytest.mark.parametrize("feedforward", [True, False])
def test_ia3_is_the_formula(feedforward):
    layer = random_layer(IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else []))
    scale, linear = layer.ia3_l["default"], layer.base_layer
    assert scale.shape == ((1, 24) if feedforward else (36, 1))
    assert layer.is_feedforward is feedforward
    x = torch.randn(2, 5, 24)
    expected = linear(x * scale[0]) if feedforward else linear(x) * scale[:, 0]
    assert torch.equal(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(linear(x), expected)


def test_ia3_rescales_what_other_methods_give():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"]))
    model.add_adapter("scale", IA3Config(target_modules=["0"], feedforward_modules=[]))
    randomise(model, "default")
    randomise(model, "scale")
    model.base_model.set_adapter(["default", "scale"])
    layer = model.base_model.model[0]
    x = torch.randn(3, 6)
    expected = layer.base_layer(x) * layer.ia3_l["scale"][:, 0]
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_scales_are_combined_by_weights():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    )
    model.add_adapter("both", IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    model.add_adapter("one", IA3Config(target_modules=["0"], feedforward_modules=[]))
    model.add_adapter("other", IA3Config(target_modules=["1"], feedforward_modules=[]))
    for seed, name in enumerate(("default", "both", "one", "other")):
        randomise(model, name, seed, 1.0)
    first, second = (layer.ia3_l for layer in model.base_model.model)
    model.add_weighted_adapter(["default", "both"], [0.3, 0.9], "sum")
    for scales in (first, second):
        torch.testing.assert_close(scales["sum"], 0.3 * scales["default"] + 0.9 * scales["both"])
    assert model.active_adapters == ["default"] and not first["sum"].requires_grad
    model.add_weighted_adapter(["default", "one"], [0.3, 0.9], "part")  # "one" leaves the second layer as it is
    torch.testing.assert_close(second["part"], 0.3 * second["default"] + 0.9)
    assert model.peft_config["part"].feedforward_modules == {"1"}
    with pytest.raises(ValueError, match="'1': some rescale its input and some its output"):
        model.add_weighted_adapter(["default", "other"], [0.3, 0.9], "wrong")
    assert "wrong" not in model.peft_config and "wrong" not in first


# settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 12, 13, 127, 128, 250, 360, 768, 1024, 4096])
@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 5, 8, 16, 10_000])
def test_factorization_splits_every_number(dimension, factor):
    first, second = factorization(dimension, factor)
    assert first * second == dimension
    if factor > 0 and dimension % factor == 0:
        assert first == factor
    else:
        assert first <= second and (factor < 0 or first <= factor)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_ranks_and_alphas_by_pattern(config):
    model = get_peft_model(
        tiny.LLAMA.build(),
        config(
            r=3, alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
            alpha_pattern={r"layers\.1\..*q_proj": 5},
        ),
    )  # fmt: skip
    first, second = (model.base_model.model.model.layers[i].self_attn for i in (0, 1))
    assert first.q_proj.r == {"default": 2} and first.v_proj.r == {"default": 3}
    assert first.q_proj.scaling == {"default": 3.0} and second.q_proj.scaling == {"default": 2.5}
    assert first.q_proj.alpha == {"default": 6} and second.q_proj.alpha == {"default": 5}
    first.q_proj.set_scale("default", 2)
    assert first.q_proj.scaling == {"default": 6.0}


@pytest.mark.parametrize(
    ("config", "rescaled"),
    [
        (lambda **kw: LoHaConfig(**kw), True),
        (lambda **kw: LoKrConfig(**kw), False),
        (lambda **kw: LoKrConfig(rank_dropout_scale=True, **kw), True),
    ],
)
def test_dropout_of_features_and_of_whole_updates(config, rescaled):
    x = torch.ones(4, 24)
    layer = random_layer(config(r=2, rank_dropout=0.5)).eval()
    exact = layer(x) - layer.base_layer(x)
    layer.train()
    dropped = layer(x) - layer.base_layer(x)
    kept = dropped[0].abs() > 1e-6
    assert 5 < kept.sum() < 31
    share = kept.float().mean() if rescaled else 1.0
    torch.testing.assert_close(dropped[:, kept] * share, exact[:, kept], atol=1e-4, rtol=1e-4)
    assert not dropped[:, ~kept].abs().max() > 1e-5
    layer = random_layer(config(r=2, module_dropout=0.5)).train()
    seen = {bool((layer(x) - layer.base_layer(x)).abs().max() > 1e-6) for _ in range(40)}
    assert seen == {True, False}
    assert layer.get_delta_weight("default").abs().max() > 0  # merging never drops
    layer = random_layer(config(r=2, rank_dropout=0.5)).train()
    delta, dropped = (layer.get_delta_weight("default", apply_rank_dropout=drop) for drop in (False, True))
    kept = dropped.abs().amax(1) > 0
    share = kept.float().mean() if rescaled else 1.0
    assert 5 < kept.sum() < 31
    torch.testing.assert_close(dropped[kept] * share, delta[kept])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoHaConfig(r=0), "`r` should be a positive integer"),
        (lambda: LoKrConfig(r=2.0), "`r` should be an integer"),
        (lambda: LoHaConfig(rank_dropout=1.5), "`rank_dropout` is a probability"),
        (lambda: LoKrConfig(module_dropout=-0.1), "`module_dropout` is a probability"),
        (lambda: LoKrConfig(decompose_factor=0), "`decompose_factor` should be"),
        (lambda: LoKrConfig(init_weights="zeros"), "`init_weights` should be"),
        (lambda: LoHaConfig(rank_pattern=[2]), "`rank_pattern` should be a dictionary"),
        (lambda: IA3Config(target_modules=["a"], feedforward_modules=["b"]), "should be a subset of `target_modules`"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig, ia3])
def test_layers_that_cannot_be_adapted_are_named(config):
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="'1' is a LayerNorm, which cannot be adapted"):
        get_peft_model(net, config(target_modules=["0", "1"]))
    assert isinstance(net[0], nn.Linear)


def test_indices_cannot_be_rescaled():
    with pytest.raises(ValueError, match="its input is indices"):
        get_peft_model(
            tiny.BERT.build(),
            IA3Config(target_modules=["word_embeddings"], feedforward_modules=["word_embeddings"]),
        )


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_a_rank_above_the_layers_size_works(config):
    layer = random_layer(config(r=100))
    x = torch.randn(3, 24)
    torch.testing.assert_close(
        layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("default").T, atol=1e-2, rtol=1e-3
    )


# all methods on one model ------------------------------------------------------------------------------------------

BASE = tiny.LLAMA
CONFIGS = {
    "low": lambda: LoraConfig(target_modules=["q_proj", "v_proj"]),
    "hadamard": lambda: LoHaConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "kronecker": lambda: LoKrConfig(r=2, target_modules=["q_proj", "k_proj"]),
    "scales": lambda: IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "networks": lambda: BottleneckConfig(bottleneck_dim=4),
}
MERGED = [name for name in CONFIGS if name != "networks"]
HOLDERS = pytest.mark.parametrize("holder", [PeftModel, PeftMixedModel])


def all_methods(holder=PeftModel, names=tuple(CONFIGS)):
    first, *others = names
    model = get_peft_model(BASE.build(), CONFIGS[first](), first, mixed=holder is PeftMixedModel).eval()
    assert type(model) is holder
    for name in others:
        model.add_adapter(name, CONFIGS[name]())
    for name in names:
        randomise(model, name, [*CONFIGS].index(name), 0.4)
    return model


@HOLDERS
def test_all_methods_act_together_and_each_alone(holder):
    model = all_methods(holder)
    alone = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        single = get_peft_model(BASE.build(), config(), name)
        randomise(single, name, seed, 0.4)
        alone[name] = logits(single.eval(), BASE)
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, BASE), alone[name], atol=1e-5, rtol=1e-4)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if f".{name}" in n
        }
    assert all((alone[a] - alone[b]).abs().max() > 1e-3 for a, b in itertools.combinations(alone, 2))
    for rows in (["scales", "hadamard", "__base__", "kronecker"], ["networks", "low", "networks", "scales"]):
        expected = [alone.get(name, logits(BASE.build(), BASE))[i] for i, name in enumerate(rows)]
        torch.testing.assert_close(logits(model, BASE, adapter_names=rows), torch.stack(expected), atol=1e-5, rtol=1e-4)
    model.base_model.set_adapter(list(CONFIGS))
    weights = copy.deepcopy(model.state_dict())
    together = logits(model, BASE)
    model.merge_adapter(MERGED)
    torch.testing.assert_close(logits(model, BASE), together, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    model(**BASE.inputs()).logits.pow(2).mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    model.delete_adapter("hadamard")
    model.set_adapter("kronecker")
    torch.testing.assert_close(logits(model, BASE), alone["kronecker"], atol=1e-5, rtol=1e-4)


@HOLDERS
def test_all_methods_are_saved_and_loaded_together(holder, tmp_path):
    model = all_methods(holder)
    model.base_model.set_adapter(list(CONFIGS))
    model.save_pretrained(tmp_path)
    first, *others = CONFIGS
    loaded = holder.from_pretrained(BASE.build(), tmp_path / first, adapter_name=first)
    assert type(loaded) is holder
    for name in others:
        result = loaded.load_adapter(tmp_path / name, name)
        assert not result.missing_keys and not result.unexpected_keys
    for names in ([*CONFIGS], *([name] for name in CONFIGS)):
        model.base_model.set_adapter(names)
        loaded.base_model.set_adapter(names)
        assert torch.equal(logits(loaded, BASE), logits(model, BASE))
    for name in CONFIGS:
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert state and not any("base_layer" in key for key in state)


def test_methods_on_one_layer_are_merged_together_or_inner_first():
    model = all_methods(names=MERGED)
    model.base_model.set_adapter(MERGED)
    expected, weights = logits(model, BASE), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'scales'.*'kronecker'.*together"):
        model.merge_adapter(["scales"])
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for name in MERGED:
        model.merge_adapter([name])
        torch.testing.assert_close(logits(model, BASE), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_named_layers_have_the_classes_that_programs_look_for():
    model = all_methods(names=MERGED)
    names = {type(layer).__mro__[1].__name__ for _, layer in adapted_modules(model)}
    assert names == {"LoraLayer", "LoHaLayer", "LoKrLayer", "IA3Layer"}
