"""Replacing an adapter in use: eager and compiled, ranks and scales differing, nothing changed when it fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from settings import randomise
from toy import DiagScaleConfig


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 12)
        self.convolution = nn.Conv1d(12, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 12, 3, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(self.embedding(x)))))
        return self.head(self.grouped(torch.tanh(self.convolution(x.mT))).mT)


TARGETS = ["embedding", "first", "second", "convolution", "grouped"]
IDS = torch.arange(10).reshape(2, 5)
OTHERS = {
    "same": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "smaller": {"r": 2},
    "larger": {"r": 6, "lora_alpha": 1},
    "patterns": {"rank_pattern": {"second": 1}, "alpha_pattern": {"first": 9}},
    "fewer layers": {"target_modules": ["first"], "r": 2},
}


def adapted(seed, **options):
    torch.manual_seed(0)
    config = LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 8, **options})
    model = get_peft_model(Small(), config).eval()
    randomise(model, seed=seed)
    return model


def everything(model):
    tensors = {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    scales = {n: dict(m.scaling) for n, m in model.named_modules() if hasattr(m, "scaling")}
    return tensors, scales, copy.deepcopy(dict(model.peft_config))


def same(one, two):
    for (n, (i, t, g)), (n2, (i2, t2, g2)) in zip(one[0].items(), two[0].items(), strict=True):
        assert (n, i, g) == (n2, i2, g2)
        assert torch.equal(t, t2)
    assert one[1:] == two[1:]


@pytest.mark.parametrize("room", [None, 6, 10])
@pytest.mark.parametrize("other", OTHERS)
def test_the_swapped_adapter_computes_and_saves_what_the_other_one_does(other, room, tmp_path):
    source, model = adapted(2, **OTHERS[other]), adapted(1)
    source.save_pretrained(tmp_path / "other")
    if room is not None:
        before = model(IDS)
        prepare_model_for_compiled_hotswap(model, target_rank=room)
        torch.testing.assert_close(model(IDS), before)
    ids = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path / "other", "default")
    torch.testing.assert_close(model(IDS), source(IDS))
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == ids
    model.save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Small(), tmp_path / "again", strict=True)
    torch.testing.assert_close(loaded(IDS), source(IDS))


VARIANTS = {
    "plain": {"target_modules": TARGETS},
    "dora": {"use_dora": True, "target_modules": ["embedding", "first", "second", "convolution"]},
    "bias": {"lora_bias": True, "target_modules": ["first", "second", "convolution"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_code_is_not_compiled_again(variant, tmp_path):
    torch._dynamo.reset()
    model = adapted(1, **VARIANTS[variant])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS))
        frames = counter.frame_count
        for i, other in enumerate(OTHERS):
            if other == "fewer layers" and variant == "dora":
                continue  # magnitudes of zero are no identity: refused
            source = adapted(3 + i, **VARIANTS[variant] | OTHERS[other])
            source.save_pretrained(tmp_path / other)
            hotswap_adapter(compiled, tmp_path / other, "default")
            torch.testing.assert_close(compiled(IDS), source(IDS))
    assert counter.frame_count == frames


def test_dora_cannot_be_replaced_on_fewer_layers():
    model, source = adapted(1, **VARIANTS["dora"]), adapted(2, use_dora=True, target_modules=["first"])
    before = everything(model)
    with pytest.raises(ValueError, match="lacks tensors for .*embedding'"):
        hotswap_adapter_from_state_dict(
            model, get_peft_model_state_dict(source), "default", source.peft_config["default"]
        )
    same(everything(model), before)


UNFIT = ("more layers", "damaged", "broken shape", "another config", "another method")


@pytest.mark.parametrize(
    ("other", "room"), [("too large", 4), *((other, room) for other in UNFIT for room in (None, 4))]
)
def test_a_swap_that_fails_changes_nothing(other, room):
    model = adapted(1)
    if room:
        prepare_model_for_compiled_hotswap(model, target_rank=room)
    options = {
        "more layers": {"target_modules": [*TARGETS, "head"]},
        "too large": {"r": 6},
        "another config": {"lora_dropout": 0.5},
    }
    source = adapted(2, **options.get(other, {}))
    tensors, config = get_peft_model_state_dict(source), source.peft_config["default"]
    key = next(k for k in tensors if "second.lora_B" in k)
    if other == "damaged":
        del tensors[key]
    if other == "broken shape":
        tensors[key] = tensors[key][:-1]
    if other == "another method":
        config = DiagScaleConfig(target_modules=["first"])
    before = everything(model)
    with pytest.raises((ValueError, RuntimeError)):
        hotswap_adapter_from_state_dict(model, tensors, "default", config)
    same(everything(model), before)


@pytest.mark.parametrize("keys", ["of a file", "bare", "of the model"])
@pytest.mark.parametrize("where", ["wrapped", "the base model itself"])
def test_tensors_may_come_by_any_of_their_names(where, keys):
    source, model = adapted(2, r=2), adapted(1)
    tensors = get_peft_model_state_dict(source)
    if keys == "bare":
        tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    if keys == "of the model":
        tensors = {n: p for n, p in source.named_parameters() if "lora_" in n}
    target = model if where == "wrapped" else model.get_base_model()
    hotswap_adapter_from_state_dict(target, tensors, "default", source.peft_config["default"])
    torch.testing.assert_close(model(IDS), source(IDS))


def test_training_goes_on_after_a_swap():
    source, model = adapted(2, r=2), adapted(1)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(source), "default", source.peft_config["default"])
    gradients = []
    for one in (model, source):
        one(IDS).square().mean().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        got = gradients[0][name]
        # B's room learns nothing as long as A's is zero, and A's as long as B's is.
        torch.testing.assert_close(got[got != 0], wanted[wanted != 0])


def test_single_trained_rows_are_replaced_by_the_same_rows_only():
    rows = {"target_modules": ["first"], "trainable_token_indices": {"embedding": [1, 4]}}
    model, source = adapted(1, **rows), adapted(2, **rows)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(source), "default", source.peft_config["default"])
    torch.testing.assert_close(model(IDS), source(IDS))
    others = adapted(3, **rows | {"trainable_token_indices": {"embedding": [1, 5]}})
    before = everything(model)
    with pytest.raises(ValueError, match="trainable_token_indices is"):
        hotswap_adapter_from_state_dict(
            model, get_peft_model_state_dict(others), "default", others.peft_config["default"]
        )
    same(everything(model), before)


def test_wrong_calls_are_refused():
    model = adapted(1, target_modules=["first", "second"])
    tensors, config = get_peft_model_state_dict(model), model.peft_config["default"]
    with pytest.raises(ValueError, match="'defualt' not found"):
        hotswap_adapter_from_state_dict(model, tensors, "defualt", config)
    with pytest.raises(ValueError, match="target_rank=2 is smaller than the rank 4"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ValueError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(Small(), target_rank=2)
    with pytest.raises(ValueError, match="not supported for DIAG_SCALE"):
        check_hotswap_configs_compatible(*[DiagScaleConfig(target_modules=["first"])] * 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter_from_state_dict(model, tensors, "default", config)
    model.unmerge_adapter()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="before compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="before compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")


def test_scales_can_be_changed_where_they_are_tensors():
    model = adapted(1, target_modules=["first", "second"])
    layer = model.base_model.model.first
    plain = model(IDS)
    prepare_model_for_compiled_hotswap(model)
    kept = layer.scaling["default"]
    layer.scale_layer(0.5)
    assert kept.item() == 1.0
    layer.set_scale("default", 3)
    assert kept.item() == 6.0
    layer.unscale_layer()
    assert layer.scaling["default"] is kept and kept.item() == 2.0
    torch.testing.assert_close(model(IDS), plain)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), plain)
