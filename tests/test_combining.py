"""Combining adapters: the arithmetic next to its definition, and what the model holds afterwards."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftWarning, get_peft_model
from peft.core.holder import adapted_modules
from peft.core.layer import AdapterLayer
from peft.kernels import combining as kernels
from peft.tuners.lora.combining import TYPES
from settings import logits, randomise
from toy import DiagScaleConfig, DiagScaleLayer

# -- the arithmetic --------------------------------------------------------------------------------------------------


def test_pruning_by_magnitude_keeps_the_largest_and_as_many_as_asked():
    tensor = torch.tensor([[1.0, -2.0, 3.0], [0.5, -0.1, 4.0]])
    assert kernels.prune(tensor, 0.5, "magnitude").tolist() == [[0, -2, 3], [0, 0, 4]]
    assert kernels.prune(tensor, 0.2, "magnitude").tolist() == [[0, 0, 0], [0, 0, 4]]
    assert not kernels.prune(tensor, 0.0, "magnitude").any()
    assert torch.equal(kernels.prune(tensor, 1.0, "magnitude"), tensor)
    assert (kernels.prune(torch.ones(4, 5), 0.25, "magnitude") == 1).sum() == 5  # ties are broken


def test_pruning_at_random_keeps_the_share_and_the_mean():
    ones = torch.ones(200, 500)
    kept = kernels.prune(ones, 0.3, "random", rescale=True)
    assert (kept != 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert kernels.prune(ones, 0.3, "random").max() == 1
    assert torch.equal(kernels.prune(ones, 1.0, "random", rescale=True), ones)


@pytest.mark.parametrize(("density", "method"), [(-0.1, "magnitude"), (float("nan"), "random"), (0.5, "largest")])
def test_impossible_pruning_is_refused(density, method):
    with pytest.raises(ValueError, match="Density|method"):
        kernels.prune(torch.ones(3), density, method)


def test_the_elected_sign_is_that_of_the_larger_sum_or_of_the_larger_number():
    tensors = torch.tensor([[5.0, -1.0], [-2.0, -1.0], [-2.0, 3.0]])
    total = kernels.calculate_majority_sign_mask(tensors, "total")
    assert total.tolist() == [[True, False], [False, False], [False, True]]
    frequency = kernels.calculate_majority_sign_mask(tensors, "frequency")
    assert frequency.tolist() == [[False, True], [True, True], [True, False]]
    assert kernels.disjoint_merge(tensors, frequency).tolist() == [-2.0, -1.0]
    assert kernels.disjoint_merge(tensors, torch.zeros_like(frequency)).tolist() == [0.0, 0.0]
    draw = torch.tensor([[1.0], [-1.0]])
    for method in ("total", "frequency"):
        assert kernels.calculate_majority_sign_mask(draw, method).tolist() == [[True], [False]]


def test_ties_by_hand():
    one, two = torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([1.0, 5.0, 0.2, 4.0])
    # Trimmed to two entries: [4, -3, 0, 0] and [0, 5, 0, 4]. Signs elected: +, +, 0, +. Means of the weighted that agree.
    merged = kernels.ties([one, two], torch.tensor([1.0, 0.5]), 0.5)
    assert merged.tolist() == [4.0, 2.5, 0.0, 2.0]


@pytest.mark.parametrize("shape", [(6, 3, 5), (4, 9, 3), (5, 2, 5)])
def test_factors_of_a_product_are_those_of_the_matrix(shape):
    m, k, n = shape
    b, a = torch.randn(m, k, dtype=torch.float64), torch.randn(k, n, dtype=torch.float64)
    for rank in (1, 2, k, k + 2):
        b1, a1 = kernels.factors_of_matrix(b @ a, rank)
        b2, a2 = kernels.factors_of_product(b, a, rank)
        assert b1.shape == b2.shape == (m, rank) and a1.shape == a2.shape == (rank, n)
        torch.testing.assert_close(b1 @ a1, b2 @ a2)
    torch.testing.assert_close(b2 @ a2, b @ a)
    assert kernels.product_norm(b, a) == pytest.approx((b @ a).norm().item())


# -- on models -------------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """One layer of each kind, to look at their weights only."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 12)
        self.conv1d = Conv1D(10, 12)
        self.conv2d = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        raise NotImplementedError


def pair(first=None, second=None):
    """A model with two different adapters, ``one`` and ``two``."""
    both = {"target_modules": ["embedding", "linear", "conv1d", "conv2d"], "r": 4, "lora_alpha": 6}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # fan_in_fan_out cannot suit both layouts
        model = get_peft_model(Kinds(), LoraConfig(**{**both, **(first or {})}), "one").eval()
        model.add_adapter("two", LoraConfig(**{**both, **(second or {})}))
    randomise(model, "one", 1)
    randomise(model, "two", 2)
    return model


def layers(model):
    return [layer for _, layer in adapted_modules(model) if isinstance(layer, AdapterLayer)]


def deltas(layer, **weights):
    """The weighted sum of those adapters that are on the layer."""
    return sum(w * layer.get_delta_weight(n) for n, w in weights.items() if layer.has_adapter(n))


DIFFERENT = {
    "same": ({}, {}),
    "ranks": ({}, {"r": 2}),
    "patterns": ({"rank_pattern": {"linear": 3}, "alpha_pattern": {"conv1d": 3}}, {"r": 3, "lora_alpha": 1}),
    "rslora": ({"use_rslora": True}, {"r": 5}),
    "targets": ({"target_modules": ["embedding", "linear"]}, {"target_modules": ["linear", "head"]}),
    "expressions": ({"target_modules": "embedding|linear"}, {"target_modules": "linear|head"}),
    "an expression and a list": ({"target_modules": "embedding|linear"}, {}),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_exact_combinations(case, how):
    """Stacked factors are exact; so is a decomposition that may have their rank."""
    model = pair(*DIFFERENT[case])
    rank = {"svd_rank": 9} if how == "svd" else {}
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", how, **rank)
    for layer in layers(model):
        torch.testing.assert_close(
            layer.get_delta_weight("both"), deltas(layer, one=0.7, two=-0.4), atol=1e-5, rtol=1e-4
        )
        assert layer.scaling["both"] == 1
    targets = model.peft_config["both"].target_modules
    if case == "targets":
        assert targets == {"embedding", "linear", "head"}


def test_svd_is_the_best_of_its_rank():
    model = pair({}, {"r": 2})
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "both")
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "small", svd_rank=1)
    for layer in layers(model):
        wanted = deltas(layer, one=1.0, two=0.5).flatten(1)
        values = torch.linalg.svdvals(wanted)
        for name, rank in (("both", 4), ("small", 1)):
            assert layer.r[name] == rank
            left = (layer.get_delta_weight(name).flatten(1) - wanted).norm()
            assert left.item() == pytest.approx(values[rank:].norm().item(), rel=1e-3)


def test_svd_clamps_to_the_quantile():
    model = pair()
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "free")
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "clamped", svd_clamp=0.8)
    for layer in layers(model):
        free, clamped = (torch.cat([f.flatten() for f in layer.factors(n)]) for n in ("free", "clamped"))
        limit = torch.quantile(free, 0.8)
        torch.testing.assert_close(clamped.abs(), free.abs().clamp(max=limit))


def test_linear_warns_with_the_measured_error_and_points_to_the_exact_types():
    model = pair()
    with pytest.warns(UserWarning, match="'cat' is exact") as caught:
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", "linear")
    off = sum((x.get_delta_weight("both") - deltas(x, one=0.7, two=0.4)).norm() ** 2 for x in layers(model))
    wanted = sum(deltas(x, one=0.7, two=0.4).norm() ** 2 for x in layers(model))
    assert f"by {(off / wanted).sqrt().item():.1%}" in str(caught[0].message)


def test_linear_of_one_adapter_is_exact_and_silent():
    model = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["one"], [-0.3], "scaled", "linear")
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("scaled"), deltas(layer, one=-0.3))


@pytest.mark.parametrize("how", TYPES)
def test_every_type_is_inactive_frozen_and_survives_saving(how, tmp_path):
    base = tiny.LLAMA
    model = get_peft_model(base.build(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), "one").eval()
    model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    for seed, name in enumerate(("one", "two")):
        randomise(model, name, seed)
    before = logits(model, base)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # of "linear"
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", how, density=0.8)
    assert torch.equal(logits(model, base), before) and model.active_adapter == "one"
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert after == {n: flags.get(n, False) for n in after}
    model.set_adapter("both")
    wanted = logits(model, base)
    assert not torch.allclose(wanted, before)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(base.build(), tmp_path / "both", strict=True)
    assert torch.equal(logits(loaded, base), wanted)


def test_cat_computes_what_both_adapters_compute_together():
    base = tiny.T5
    model = get_peft_model(base.build(), LoraConfig(r=3, target_modules=list(base.targets)), "one").eval()
    model.add_adapter("two", LoraConfig(r=2, target_modules=list(base.targets)))
    randomise(model, "one", 1)
    randomise(model, "two", 2)
    model.add_weighted_adapter(["one", "two"], [1, 1], "both", "cat")
    model.base_model.set_adapter(["one", "two"])
    together = logits(model, base)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, base), together, atol=1e-5, rtol=1e-4)


def test_half_precision_stays():
    base = tiny.LLAMA
    model = get_peft_model(base.build(torch.bfloat16), LoraConfig(), "one", autocast_adapter_dtype=False)
    randomise(model, "one", 1)
    for how in ("cat", "svd", "ties_svd"):
        model.add_weighted_adapter(["one"], [2.0], how, how, density=1.0)
        for layer in layers(model):
            assert {f.dtype for f in layer.factors(how)} == {torch.bfloat16}
            torch.testing.assert_close(layer.get_delta_weight(how), deltas(layer, one=2.0), atol=2e-2, rtol=2e-2)


def test_targets_that_narrow_down_differently_are_named_in_full(tmp_path):
    base = tiny.LLAMA
    model = get_peft_model(base.build(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]), "one").eval()
    model.add_adapter("two", LoraConfig(target_modules=r".*layers\.1.*v_proj"))
    randomise(model, "one", 1)
    randomise(model, "two", 2)
    model.add_weighted_adapter(["one", "two"], [1, 1], "both", "cat")
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(base.build(), tmp_path / "both", strict=True)
    assert torch.equal(logits(loaded, base), logits(model, base))
    assert [n for n, _ in adapted_modules(loaded.get_base_model())] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_trained_biases_are_left_out_with_a_warning():
    model = get_peft_model(Kinds(), LoraConfig(target_modules=["linear"], bias="lora_only"), "one")
    with pytest.warns(PeftWarning, match="biases"):
        model.add_weighted_adapter(["one"], [1.0], "new")
    assert model.peft_config["new"].bias == "none" and model.peft_config["one"].bias == "lora_only"


WRONG = {
    "an unknown type": (["one", "two"], [1, 1], "new", {"combination_type": "lineer"}, "did you mean 'linear'"),
    "an unknown adapter": (["one", "tow"], [1, 1], "new", {}, "did you mean 'two'"),
    "a taken name": (["one", "two"], [1, 1], "two", {}, "already exists"),
    "too few weights": (["one", "two"], [1], "new", {}, "as many weights"),
    "no adapters": ([], [], "new", {}, "at least one"),
    "an adapter twice": (["one", "one"], [1, 1], "new", {}, "different adapter names"),
    "a weight that is no number": (["one", "two"], [1, float("nan")], "new", {}, "finite"),
    "different ranks": (["one", "small"], [1, 1], "new", {"combination_type": "linear"}, "same r value.*'embedding'"),
    "no density": (["one", "two"], [1, 1], "new", {"combination_type": "ties"}, "density"),
    "a negative density": (["one", "two"], [1, 1], "new", {"combination_type": "ties", "density": -1}, "density"),
    "an unknown sign method": (
        ["one", "two"], [1, 1], "new", {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "majority",
    ),
    "a rank of zero": (["one", "two"], [1, 1], "new", {"svd_rank": 0}, "svd_rank"),
    "a quantile below zero": (["one", "two"], [1, 1], "new", {"svd_clamp": 0.1}, "'embedding'.*leaves nothing"),
    "a quantile beyond 1": (["one", "two"], [1, 1], "new", {"svd_clamp": 2}, "quantile"),
    "several methods": (["one", "scale"], [1, 1], "new", {}, "of one method"),
    "another method": (["scale"], [1], "new", {}, "'linear', a DiagScaleLayer"),
    "a grouped convolution": (["grouped"], [1], "new", {}, "'grouped'.*grouped convolution"),
    "whole modules": (["one", "head"], [1, 1], "new", {}, "'head' is trained in full"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_combinations_are_refused_and_change_nothing(case):
    adapters, weights, name, options, message = WRONG[case]
    model = pair()
    model.add_adapter("small", LoraConfig(r=2, target_modules=["embedding"]))
    model.add_adapter("scale", DiagScaleConfig(target_modules=["linear"]))
    model.add_adapter("head", LoraConfig(target_modules=["linear"], modules_to_save=["head"]))
    model.add_adapter("grouped", LoraConfig(target_modules=["grouped"]))
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    configs = copy.deepcopy(dict(model.peft_config))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name, **options)
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert after.keys() == before.keys() and configs == dict(model.peft_config)
    assert all(torch.equal(after[n][0], p) and after[n][1] == flag for n, (p, flag) in before.items())


def test_a_density_above_one_warns_and_prunes_nothing():
    model = pair()
    model.add_weighted_adapter(["one", "two"], [1, 1], "all", "magnitude_prune", density=1.0)
    with pytest.warns(PeftWarning, match="density"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "more", "magnitude_prune", density=1.5)
    for layer in layers(model):
        assert torch.equal(layer.get_delta_weight("more"), layer.get_delta_weight("all"))


# -- methods that only say that their parameters add up --------------------------------------------------------------


def scales():
    base = tiny.LLAMA
    model = get_peft_model(base.build(), DiagScaleConfig(target_modules=["q_proj"]), "one").eval()
    model.add_adapter("two", DiagScaleConfig(target_modules=["q_proj", "v_proj"]))
    randomise(model, "one", 1)
    randomise(model, "two", 2)
    return model


def test_parameters_that_add_up():
    model = scales()
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "both")
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("both"), deltas(layer, one=0.5, two=-2.0))
    assert model.peft_config["both"].target_modules == {"q_proj", "v_proj"}


def test_parameters_that_do_not_add_up_are_refused(monkeypatch):
    model = scales()
    monkeypatch.setattr(DiagScaleLayer, "adds_up", False)
    with pytest.raises(ValueError, match="DiagScaleLayer parameters is no weighted sum"):
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "both")
    assert "both" not in model.peft_config


# -- adapters of several methods -------------------------------------------------------------------------------------


def test_a_mixed_model_holds_activates_merges_and_saves_adapters_of_several_methods(tmp_path):
    base = tiny.LLAMA
    plain = logits(base.build(), base)
    model = get_peft_model(base.build(), LoraConfig(target_modules=["q_proj"]), "lora_one", mixed=True).eval()
    assert type(model) is PeftMixedModel and model.active_adapter == ["lora_one"]
    model.add_adapter("scale", DiagScaleConfig(target_modules=["q_proj", "v_proj"]))
    randomise(model, "lora_one", 1)
    randomise(model, "scale", 2)
    alone = {}
    for name in ("lora_one", "scale"):
        model.set_adapter(name)
        alone[name] = logits(model, base)
    model.set_adapter(["lora_one", "scale"])
    assert model.active_adapter == ["lora_one", "scale"]
    assert {n.rsplit(".", 2)[-2 if "lora" in n else -1] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_one", "scale",
    }  # fmt: skip
    together = logits(model, base)
    assert not any(torch.allclose(together, other) for other in (plain, *alone.values()))
    with model.disable_adapter():
        assert torch.equal(logits(model, base), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, base), together, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, base), together)

    model.save_pretrained(tmp_path)
    loaded = PeftMixedModel.from_pretrained(base.build(), tmp_path / "lora_one", "lora_one")
    loaded.load_adapter(tmp_path / "scale", "scale")
    loaded.set_adapter(["lora_one", "scale"])
    assert torch.equal(logits(loaded, base), together)

    model.delete_adapter("scale")
    torch.testing.assert_close(logits(model, base), alone["lora_one"])
    torch.testing.assert_close(logits(loaded.merge_and_unload(), base), together, atol=1e-5, rtol=1e-4)
