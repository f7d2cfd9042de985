"""The promises that hold for every method: one row of settings.py each, every test here."""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import tiny
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.core.checkpoints import training_tensors
from peft.core.holder import BaseTunerLayer, adapted_modules
from peft.core.layer import AdapterLayer
from peft.core.mixed import Groups
from peft.core.ranked import ScaledLayer
from settings import CASES, IDS, ONE_EACH, ONE_EACH_IDS, SETTINGS, equal, logits, outputs, own_tensors, randomise

every_case = pytest.mark.parametrize(("setting", "base"), CASES, ids=IDS)
every_method = pytest.mark.parametrize(("setting", "base"), ONE_EACH, ids=ONE_EACH_IDS)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def skip_unless_mergeable(model):
    reason = why_not_mergeable(model)
    if reason:
        pytest.skip(f"the method cannot be merged: {reason}")


def why_not_mergeable(model):
    reasons = [m.why_no_merge for _, m in adapted_modules(model) if isinstance(m, AdapterLayer)]
    return reasons[0] if reasons else "it changes no weight; that merging is refused is tested below"


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


def two_adapters(setting, base, dtype=torch.float32):
    model = setting.model(base, dtype)
    model.add_adapter("other", setting.make(base, **setting.second))
    randomise(model, "default", 1)
    randomise(model, "other", 2)
    return model


# 1 -----------------------------------------------------------------------------------------------------------------


@every_case
def test_a_fresh_adapter_changes_nothing(setting, base):
    if "fresh" in setting.exempt:
        pytest.skip(f"exempt: {setting.exempt['fresh']}")
    plain = logits(base.build(), base)
    fresh = logits(setting.model(base), base)
    if "bit-exact start" in setting.exempt:
        torch.testing.assert_close(fresh, plain, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(fresh, plain)


@every_case
def test_a_trained_adapter_changes_something(setting, base):
    model = setting.model(base)
    plain = logits(base.build(), base)
    randomise(model)
    assert (logits(model, base) - plain).abs().max() > 1e-3


# 2 -----------------------------------------------------------------------------------------------------------------


@every_case
def test_only_the_adapter_trains(setting, base):
    model = setting.model(base)
    own = {id(t) for t in own_tensors(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
    randomise(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(**base.inputs()).logits.float().pow(2).mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None, name
        else:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)


@every_method
def test_adding_loading_and_deleting_change_no_other_flag(setting, base, tmp_path):
    model = setting.model(base)
    model.save_pretrained(tmp_path)
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # by the user
    before, training = flags(model), model.training
    model.train()
    model.add_adapter("second", setting.make(base, **setting.second))
    model.load_adapter(tmp_path, "third")
    assert model.active_adapter == "default"
    assert model.training
    assert {n: f for n, f in flags(model).items() if n in before} == before
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in before)
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert flags(model) == before
    model.train(training)


# 3 -----------------------------------------------------------------------------------------------------------------


@every_case
def test_saved_and_loaded_outputs_are_identical(setting, base, tmp_path):
    model = setting.model(base)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(logits(loaded, base), logits(model, base))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(p.device.type == "cpu" for p in loaded.parameters())


@every_case
def test_the_file_holds_the_adapter_and_nothing_else(setting, base, tmp_path):
    model = setting.model(base)
    base_tensors = {id(p) for n, p in model.named_parameters() if not p.requires_grad}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model)
    assert set(tensors) == set(own)
    assert not {id(t) for t in own.values()} & base_tensors
    assert not any("default" in key for key in tensors)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < sum(t.numel() * 4 for t in own.values()) + 200 * (len(own) + 1)


@every_method
def test_the_configuration_round_trips(setting, base, tmp_path):
    config = setting.make(base, **setting.second)
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is type(config)
    assert read == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value


# 5 -----------------------------------------------------------------------------------------------------------------


@every_case
def test_disabling_restores_the_base_model_and_then_every_flag(setting, base):
    model = setting.model(base)
    randomise(model)
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    before, changed = flags(model), logits(model, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, base), logits(base.build(), base))
    assert flags(model) == before
    assert torch.equal(logits(model, base), changed)


@every_case
def test_disabling_while_merged_restores_the_base_model_and_merges_again(setting, base):
    model = setting.model(base)
    skip_unless_mergeable(model)
    randomise(model)
    model.merge_adapter()
    merged = logits(model, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, base), logits(base.build(), base))
    assert torch.equal(logits(model, base), merged)
    assert model.get_model_status().merged_adapters == ["default"]


# 6 -----------------------------------------------------------------------------------------------------------------


@every_case
def test_adapters_are_switched_deleted_and_added_again(setting, base):
    model = two_adapters(setting, base)
    first = logits(model, base)
    model.set_adapter("other")
    second = logits(model, base)
    assert (first - second).abs().max() > 1e-4
    model.set_adapter("default")
    assert torch.equal(logits(model, base), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model, base), first)
    model.add_adapter("other", setting.make(base, **setting.second))
    randomise(model, "other", 2)
    model.set_adapter("other")
    assert torch.equal(logits(model, base), second)
    assert all(p.requires_grad == ("other" in n) for n, p in model.named_parameters() if "other" in n or "default" in n)


@every_method
def test_switching_leaves_exactly_the_active_adapter_trainable_whatever_happened_in_between(setting, base):
    model = two_adapters(setting, base)

    def holds():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if "default" in parts or "other" in parts:
                assert parameter.requires_grad == (model.active_adapter in parts), name
        assert any(p.requires_grad for p in model.parameters())

    def switch():
        model.set_adapter("default" if model.active_adapter == "other" else "other")
        holds()

    switch()
    for parameter in model.parameters():  # by hand
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    switch()
    # Wrappers put other modules and parameters in place.
    for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
        for slot in layer.adapter_layer_names:
            holder = getattr(layer, slot)
            for name in list(holder):
                new = copy.deepcopy(holder[name])
                for parameter in [new] if isinstance(new, torch.nn.Parameter) else new.parameters():
                    parameter.requires_grad_(True)
                holder[name] = new
    switch()
    for module in [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "other" in n.split(".")]:
        torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Identity())
        module.parametrizations.weight.original.requires_grad_(True)
    switch()
    switch()
    twin = copy.deepcopy(model)
    switch()
    assert [p.requires_grad for p in twin.parameters()] != [p.requires_grad for p in model.parameters()]
    model.delete_adapter("other") if model.active_adapter == "default" else model.delete_adapter("default")
    left = next(iter(model.peft_config))
    model.set_adapter(left)
    holds()


@every_method
def test_deleting_the_active_adapter_activates_another(setting, base):
    model = two_adapters(setting, base)
    model.set_adapter("other")
    expected = logits(model, base)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="'default' was active"):
        model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert torch.equal(logits(model, base), expected)


@every_case
def test_adapters_active_together_act_one_after_the_other(setting, base):
    if base.task_type == "SEQ_CLS":
        pytest.skip("two adapters that each train the head cannot be active together; tested below")
    model = two_adapters(setting, base)
    model.set_adapter(["default", "other"])
    both = logits(model, base)
    skip_unless_mergeable(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model, base), both, atol=2e-5, rtol=1e-4)


def test_two_trained_heads_cannot_be_active_together():
    setting, base = CASES[0]
    model = two_adapters(setting, base)
    with pytest.raises(ValueError, match="Only one adapter can be active"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapter == "default"


@every_method
def test_work_for_one_more_adapter_does_not_grow_with_their_number(setting, base, tmp_path):
    """Counts the modules that loading and switching visit, which is what made the 60th adapter slow elsewhere."""
    model = setting.model(base)
    model.save_pretrained(tmp_path)
    visited = []
    for number in range(6):
        count = 0

        def tally(frame, event, arg):
            nonlocal count
            count += event == "call"

        import sys

        sys.setprofile(tally)
        try:
            model.load_adapter(tmp_path, f"a{number}")
            model.set_adapter(f"a{number}")
        finally:
            sys.setprofile(None)
        visited.append(count)
    # Switching freezes all others: a few calls for each, and not one more walk.
    assert visited[5] < visited[1] * 1.5


# 7 -----------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_merged_outputs_equal_unmerged_and_unmerging_is_exact(setting, base, dtype):
    model = setting.model(base, dtype)
    skip_unless_mergeable(model)
    randomise(model, scale=0.1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    unmerged = logits(model, base)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        merged = logits(model, base)
        model.unmerge_adapter()
    scale = unmerged.float().abs().max()
    assert (merged.float() - unmerged.float()).abs().max() <= TOLERANCE[dtype] * max(scale, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert torch.equal(logits(model, base), unmerged)


@every_method
def test_a_hundred_cycles_in_bf16_leave_the_weights_bit_for_bit(setting, base):
    model = two_adapters(setting, base, torch.bfloat16)
    skip_unless_mergeable(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for cycle in range(100):
        model.merge_adapter(["default", "other"] if cycle % 2 else ["default"])
        model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@every_method
def test_adapters_merged_on_top_of_one_another_come_out_in_any_order(setting, base):
    model = two_adapters(setting, base, torch.bfloat16)
    skip_unless_mergeable(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter(["other"])
    alone = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    model.base_model.unmerge_adapter(["default"])  # the first one in, first
    assert all(torch.equal(p, alone[n]) for n, p in model.named_parameters())
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@every_method
def test_without_a_kept_copy_unmerging_subtracts_or_refuses(setting, base):
    model = setting.model(base)
    skip_unless_mergeable(model)
    randomise(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.base_model.merge_adapter(keep_original=False)
    layer = next(m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer))
    if layer.needs_weight("default"):
        with pytest.raises(RuntimeError, match="keep_original=True"):
            model.unmerge_adapter()
    else:
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, weights[name], atol=1e-5, rtol=1e-5)


@every_method
def test_a_weight_changed_after_merging_is_noticed(setting, base):
    model = setting.model(base)
    skip_unless_mergeable(model)
    randomise(model)
    layer = next(m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer))
    if layer.needs_weight("default"):
        pytest.skip("the method cannot subtract, and refuses: tested above")
    model.merge_adapter()
    with torch.no_grad():
        layer.get_base_layer().weight.add_(1.0)
    expected = layer.get_base_layer().weight.detach() - layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="changed, cast or moved"):
        model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), expected.detach())


@every_method
def test_the_kept_copy_is_no_state_follows_copies_and_is_announced(setting, base, caplog):
    model = setting.model(base)
    skip_unless_mergeable(model)
    randomise(model)
    plain_keys = set(model.state_dict())
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with caplog.at_level(logging.INFO, "peft"):
        model.merge_adapter()
    assert "MB" in caplog.text
    assert set(model.state_dict()) == plain_keys
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in twin.named_parameters())
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@every_case
def test_merge_and_unload_gives_a_plain_model(setting, base):
    model = setting.model(base)
    skip_unless_mergeable(model)
    randomise(model)
    expected = logits(model, base)
    plain = model.merge_and_unload()
    assert type(plain) is type(base.build())
    assert set(plain.state_dict()) == set(base.build().state_dict())
    assert not hasattr(plain, "peft_config")
    assert not any(hasattr(m, "_peft_merge_record") for m in plain.modules())
    torch.testing.assert_close(logits(plain, base), expected, atol=2e-5, rtol=1e-4)


@every_case
def test_unload_gives_the_base_model_back(setting, base):
    model = setting.model(base)
    randomise(model)
    if why_not_mergeable(model) is None:
        model.merge_adapter()
    plain = model.unload()
    reference = base.build().state_dict()
    assert {k: torch.equal(v, reference[k]) for k, v in plain.state_dict().items()} == dict.fromkeys(reference, True)


@every_method
def test_broken_weights_are_not_merged(setting, base):
    model = setting.model(base)
    skip_unless_mergeable(model)
    randomise(model)
    *_, last = get_peft_model_state_dict(model).values()
    with torch.no_grad():
        last.view(-1)[0] = float("nan")
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.isfinite().all()}
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(dict(model.named_parameters())[n], w) for n, w in weights.items())
    assert model.get_model_status().merged_adapters == []


@every_case
def test_what_has_nothing_to_merge_is_not_dropped_in_silence(setting, base):
    model = setting.model(base)
    if setting.has_targets:
        pytest.skip("the method has weights to merge, or says itself why not")
    randomise(model)
    before = logits(model, base)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no change of a weight"):
            call()
    assert torch.equal(logits(model, base), before)


# 8 -----------------------------------------------------------------------------------------------------------------


@every_case
def test_mixed_batches_equal_each_row_alone(setting, base):
    model = two_adapters(setting, base)
    names = ["other", "default", "__base__", "other"]
    rows = []
    for index, name in enumerate(names):
        single = {k: v[index : index + 1] for k, v in base.inputs().items()}
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(outputs(model, single))
            else:
                model.set_adapter(name)
                rows.append(outputs(model, single))
    model.set_adapter("default")
    mixed = logits(model, base, adapter_names=names)
    torch.testing.assert_close(mixed, torch.cat(rows), atol=2e-6, rtol=1e-5)
    assert equal(setting, logits(model, base), logits(model, base, adapter_names=["default"] * 4))


@every_method
def test_wrong_mixed_batches_are_errors(setting, base):
    model = two_adapters(setting, base)
    with pytest.raises(ValueError, match="has 2 names, but the batch has 4 rows"):
        logits(model, base, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match=r"'othr' \(did you mean 'other'\?\)"):
        logits(model, base, adapter_names=["default", "othr", "other", "other"])
    with pytest.raises(ValueError, match="one adapter name per row"):
        logits(model, base, adapter_names="default")
    model.train()
    with pytest.raises(ValueError, match="allow_mixed_training=True"):
        model(**base.inputs(), adapter_names=["default"] * 4)
    model.eval()
    if why_not_mergeable(model) is None:
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            logits(model, base, adapter_names=["default"] * 4)


@every_method
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_mixed_training_gives_each_adapter_the_gradients_of_its_rows(setting, base, checkpointing):
    names = ["other", "default", "__base__", "other"]
    model = two_adapters(setting, base)
    model.set_requires_grad(["default", "other"])
    expected = {}
    for name in ("default", "other"):
        alone = two_adapters(setting, base)
        alone.set_adapter(name)
        rows = [i for i, n in enumerate(names) if n == name]
        outputs(alone, {k: v[rows] for k, v in base.inputs().items()}).pow(2).sum().backward()
        expected |= {n: p.grad for n, p in alone.named_parameters() if f".{name}" in n}
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    out = model(**base.inputs(), adapter_names=names, allow_mixed_training=True).logits
    out[[0, 1, 3]].pow(2).sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-5, rtol=1e-4)


@every_method
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_rows_may_have_several_adapters_which_all_learn_from_them(setting, base, checkpointing):
    names = [("default", "other"), "other", "__base__", ("other", "default")]
    alone, model = two_adapters(setting, base), two_adapters(setting, base)
    model.add_adapter("idle", setting.make(base))
    model.set_requires_grad(["default", "other", "idle"])
    rows = []
    for index, name in enumerate(names):
        single = {k: v[index : index + 1] for k, v in base.inputs().items()}
        if name == "__base__":
            with alone.disable_adapter():
                rows.append(outputs(alone, single))
        else:
            alone.set_adapter([name] if isinstance(name, str) else list(name))
            rows.append(outputs(alone, single))
            rows[-1].pow(2).sum().backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    with torch.no_grad():
        mixed = outputs(model, base.inputs(), adapter_names=names)
    torch.testing.assert_close(mixed, torch.cat(rows).detach(), atol=5e-6, rtol=1e-5)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    out = outputs(model, base.inputs(), adapter_names=names, allow_mixed_training=True)
    torch.testing.assert_close(out.detach(), mixed, atol=5e-6, rtol=1e-5)
    out[[0, 1, 3]].pow(2).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected and not any(".idle" in n for n, g in found.items() if g.any())
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (found[name] - gradient).abs().max() <= 1e-4 * scale, name


@every_method
def test_mixed_generation_with_beams_equals_each_row_alone(setting, base):
    assert base.task_type == "CAUSAL_LM"
    model = two_adapters(setting, base)
    names = ["other", "default", "__base__", "other"]
    inputs = base.inputs()
    for beams in (1, 3):
        arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "min_new_tokens": 5}
        mixed = model.generate(**inputs, adapter_names=names, **arguments)
        for index, name in enumerate(names):
            single = {k: v[index : index + 1] for k, v in inputs.items()}
            alone = model.generate(**single, adapter_names=[name], **arguments)
            assert torch.equal(mixed[index], alone[0]), (beams, name)


def test_mixed_generation_of_an_encoder_decoder_with_beams():
    setting, base = next((s, b) for s, b in CASES if b.name == "t5")
    model = two_adapters(setting, base)
    names = ["other", "default", "__base__", "other"]
    inputs = {k: v for k, v in base.inputs().items() if k != "decoder_input_ids"}
    arguments = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "num_beams": 2,
        "num_return_sequences": 2,
    }
    mixed = model.generate(**inputs, adapter_names=names, **arguments)
    for index, name in enumerate(names):
        alone = model.generate(
            **{k: v[index : index + 1] for k, v in inputs.items()}, adapter_names=[name], **arguments
        )
        assert torch.equal(mixed[2 * index : 2 * index + 2], alone)


# 9 -----------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["enabled-before", "enabled-after"])
def test_gradient_checkpointing_gives_the_same_gradients(setting, base, reentrant, before):
    plain = setting.model(base)
    randomise(plain)
    plain.train()
    plain(**base.inputs()).logits.pow(2).sum().backward()
    model = base.build()
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if before:
        model.gradient_checkpointing_enable(**arguments)
    model = get_peft_model(model, setting.make(base))
    if not before:
        model.gradient_checkpointing_enable(**arguments)
        model.enable_input_require_grads()
    randomise(model)
    model.train()
    model(**base.inputs()).logits.pow(2).sum().backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if expected.requires_grad:
            scale = max(1.0, float(expected.grad.abs().max()))
            assert (found.grad - expected.grad).abs().max() <= 1e-5 * scale, name


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_bases_have_float32_adapters(setting, base, dtype):
    model = setting.model(base, dtype)
    own = own_tensors(model)
    layers = [m for _, m in adapted_modules(model) if isinstance(m, AdapterLayer) or m.stands_alone]
    assert all(p.dtype == torch.float32 for m in layers for p in m.adapter_parameters("default"))
    randomise(model)
    out = model(**base.inputs()).logits
    assert out.dtype == dtype
    out.float().pow(2).mean().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in own.values())
    model = get_peft_model(base.build(dtype), setting.make(base), autocast_adapter_dtype=False)
    assert all(p.dtype == dtype for p in get_peft_model_state_dict(model).values())
    assert model(**base.inputs()).logits.dtype == dtype


@every_method
def test_autocast(setting, base):
    model = setting.model(base)
    randomise(model, scale=0.05)
    exact = logits(model, base)
    with torch.autocast("cpu", torch.bfloat16):
        out = outputs(model, base.inputs())
    out.float().pow(2).mean().backward()
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_method
def test_compile_without_graph_breaks(setting, base):
    model = two_adapters(setting, base)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {k: v for k, v in base.inputs().items() if k != "attention_mask"}
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    compiled(**inputs).logits.pow(2).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(**inputs).logits.pow(2).sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, atol=1e-4, rtol=1e-4)
    model.set_adapter("other")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@every_case
def test_copies_and_pickles_are_independent_and_equal(setting, base):
    model = two_adapters(setting, base)
    expected = logits(model, base)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    randomise(model, seed=5)
    for other in (twin, pickled):
        assert torch.equal(logits(other, base), expected)
        other.set_adapter("other")
        logits(other, base, adapter_names=["default", "other", "__base__", "other"])
    assert model.active_adapter == "default"


@every_method
def test_construction_on_meta_and_assignment_from_files(setting, base, tmp_path):
    model = setting.model(base)
    randomise(model)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = base.build()
    if "meta" in setting.exempt:
        with pytest.raises(ValueError, match="meta device"):
            PeftModel.from_pretrained(empty, tmp_path)
        return
    # What makes a prefix while it trains is no part of an adapter that is only used.
    holder = PeftModel.from_pretrained(empty, tmp_path, is_trainable=bool(training_tensors(model, "default")))
    assert all(p.device.type == "meta" for n, p in holder.named_parameters() if "base_layer" in n)
    state = model.state_dict()
    holder.load_state_dict(state, strict=True, assign=True)
    for module, source in zip(
        holder.modules(), model.modules(), strict=True
    ):  # what is no state, such as rotary tables
        for name, buffer in source.named_buffers(recurse=False):
            module.register_buffer(name, buffer.clone(), persistent=name not in module._non_persistent_buffers_set)
    assert torch.equal(logits(holder.eval(), base), logits(model, base))


# 10 ----------------------------------------------------------------------------------------------------------------


@every_method
def test_a_call_that_fails_leaves_the_model_as_it_was(setting, base, tmp_path):
    model = two_adapters(setting, base)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(weights.read_bytes()[:-20])
    calls = [
        lambda: model.add_adapter("default", setting.make(base)),
        lambda: model.add_adapter("a.b", setting.make(base)),
        *(lambda wrong=wrong: model.add_adapter("new", setting.make(base, **wrong)) for wrong in setting.wrong),
        lambda: model.set_adapter("missing"),
        lambda: model.set_adapter(["default", "missing"]),
        lambda: model.delete_adapter("missing"),
        lambda: model.merge_adapter(["missing"]),
        lambda: model.load_adapter(tmp_path / "nowhere", "new"),
        lambda: model.load_adapter(broken, "new"),
        lambda: model.save_pretrained(weights),
        lambda: model.save_pretrained(tmp_path / "out", selected_adapters=["missing"]),
        lambda: logits(model, base, adapter_names=["missing"] * 4),
    ]

    def snapshot():
        return (
            [
                (n, type(m).__name__, len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
                for n, m in model.named_modules()
            ],
            {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()},
            list(model.peft_config),
            model.active_adapters,
        )

    before, outputs = snapshot(), logits(model, base)
    for number, call in enumerate(calls):
        with pytest.raises((ValueError, OSError)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        assert snapshot() == before, number
    assert torch.equal(logits(model, base), outputs)
    assert not (tmp_path / "out").exists()


@every_method
def test_a_failed_first_injection_leaves_a_plain_model(setting, base):
    model = base.build()
    keys, wanted = list(model.state_dict()), flags(model)
    whole = next(name for name, child in model.named_children() if isinstance(child, PreTrainedModel))
    partly = ({"target_modules": [*base.targets, whole]},) if setting.has_targets else ()
    for wrong in (*setting.wrong, *partly):
        with pytest.raises(ValueError):
            get_peft_model(model, setting.make(base, **wrong))
    assert list(model.state_dict()) == keys
    assert flags(model) == wanted
    assert not hasattr(model, "peft_config")


# without a holder --------------------------------------------------------------------------------------------------


@every_method
def test_injection_without_a_holder_is_the_same(setting, base):
    held = setting.model(base)
    randomise(held)
    raw = inject_adapter_in_model(setting.make(base), base.build())
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(raw, get_peft_model_state_dict(held))
    assert not result.unexpected_keys
    assert equal(setting, logits(raw, base), logits(held, base))
    bare = (
        k.removeprefix("base_model.").removeprefix("model." if setting.has_targets else "")
        for k in get_peft_model_state_dict(held)
    )
    assert set(bare) == set(get_peft_model_state_dict(raw))


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "loha", "lokr"])
def test_the_promises_of_weight_methods_are_checked_on_every_kind_of_layer(name):
    models = [setting.model(base) for setting, base in CASES if setting.name == name]
    kinds = {m.kind.name for model in models for _, m in adapted_modules(model) if isinstance(m, AdapterLayer)}
    assert kinds == {"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"}


# 11 ----------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts what is asked of torch's kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


GROUPED = [
    s for s in SETTINGS if s.name in ("lora", "dora", "loha", "lokr", "houlsby", "pfeiffer", "parallel", "compacter")
]


@pytest.mark.parametrize("setting", GROUPED, ids=lambda s: s.name)
def test_layers_do_not_loop_over_the_adapters_of_a_mixed_batch(setting):
    base = tiny.LLAMA
    names = ["default", *(f"adapter-{i}" for i in range(1, 12))]

    def growth(**options):
        """Calls that each further adapter adds to a forward pass."""
        model = setting.model(base, **options)
        for name in names[1:]:
            model.add_adapter(name, setting.make(base, **options))
        counts = []
        for adapters in (4, 8, 12):
            with torch.no_grad(), Calls() as calls:
                model(**base.inputs(rows=24), adapter_names=[names[row % adapters] for row in range(24)])
            counts.append(calls.count)
        return [b - a for a, b in itertools.pairwise(counts)]

    # Sorting the rows costs something for each adapter, once for all layers: as much in a model of one layer.
    assert growth() == growth(layers_to_transform=[0])


@pytest.mark.parametrize("setting", [s for s in GROUPED if s.name in ("lora", "dora", "lokr")], ids=lambda s: s.name)
def test_rows_that_move_to_their_adapters_and_adapters_that_move_to_their_rows_meet_alike(setting, monkeypatch):
    model = setting.model(tiny.LLAMA)
    model.add_adapter("other", setting.make(tiny.LLAMA))
    randomise(model, "default", 1)
    randomise(model, "other", 2)
    inputs, names = tiny.LLAMA.inputs(rows=5), ["default", "other", "other", "default", "other"]
    outputs = []
    for moves in (True, False):
        asked = []
        monkeypatch.setattr(ScaledLayer, "moves_factors", lambda *a, moves=moves, asked=asked: asked.append(a) or moves)
        with torch.no_grad():
            outputs.append(model(**inputs, adapter_names=names).logits)
        assert asked
    torch.testing.assert_close(*outputs)


def test_adapters_are_laid_side_by_side_once_a_generation_and_for_single_calls_in_memory_that_layers_share(monkeypatch):
    laid = []
    monkeypatch.setattr(Groups, "lay", lambda *a, lay=Groups.lay: laid.append(lay(*a)) or laid[-1])
    setting = next(s for s in SETTINGS if s.name == "lora")
    model = setting.model(tiny.LLAMA).eval()
    model.add_adapter("other", setting.make(tiny.LLAMA))
    inputs, names = tiny.LLAMA.inputs(rows=2), ["default", "other"]

    def generate(tokens):
        laid.clear()
        model.generate(**inputs, adapter_names=names, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return len(laid), len({t.data_ptr() for t in laid})

    layers = sum(isinstance(m, AdapterLayer) for m in model.modules())
    assert generate(2) == generate(6) == (2 * layers, 2 * layers)
    with torch.no_grad():
        for _ in range(2):  # the memory has its size after the first call
            laid.clear()
            model(**inputs, adapter_names=names)
    assert (len(laid), len({t.data_ptr() for t in laid})) == (2 * layers, 2)
