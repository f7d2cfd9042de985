"""Layer replication: a deeper model of the same weights, with an adapter for each place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from settings import logits, randomise

RANGES = [(0, 2), (1, 2), (0, 1)]


def config(ranges=RANGES, **options):
    return LoraConfig(target_modules=["q_proj"], layer_replication=ranges, task_type="CAUSAL_LM", **options)


def replicated(base=tiny.LLAMA, ranges=RANGES):
    return get_peft_model(base.build(), config(ranges)).eval()


def by_hand(ranges=RANGES):
    """The same depth with weights of its own in each place."""
    source = tiny.LLAMA.build()
    order = [number for start, end in ranges for number in range(start, end)]
    layers = [copy.deepcopy(source.model.layers[number]) for number in order]
    source.config.num_hidden_layers = len(order)
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    source.model.layers = nn.ModuleList(layers)
    return source


def test_the_model_is_as_deep_as_asked_and_shares_its_weights():
    model = replicated()
    layers = model.base_model.model.model.layers
    assert len(layers) == model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert layers[0].mlp.up_proj.weight is layers[3].mlp.up_proj.weight
    assert layers[0].self_attn.q_proj.base_layer.weight is layers[3].self_attn.q_proj.base_layer.weight
    plain = sum(p.numel() for p in tiny.LLAMA.build().parameters())
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" not in n) == plain
    assert sum("lora_A" in n for n, _ in model.named_parameters()) == 4


def test_it_computes_what_the_same_layers_one_after_another_do():
    assert torch.equal(logits(replicated(), tiny.LLAMA), logits(by_hand(), tiny.LLAMA))


@pytest.mark.parametrize("ranges", [[(1, 2), (0, 2), (0, 1)], [(0, 1)]], ids=["reordered", "shortened"])
def test_order_and_gaps(ranges):
    assert torch.equal(logits(replicated(ranges=ranges), tiny.LLAMA), logits(by_hand(ranges), tiny.LLAMA))


def test_generation_with_a_cache_equals_that_without():
    model = replicated()
    randomise(model)
    arguments = {**tiny.LLAMA.inputs(), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**arguments), model.generate(**arguments, use_cache=False))


def test_saved_loaded_and_joined_by_a_second_adapter(tmp_path):
    model = replicated()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path)
    assert torch.equal(logits(loaded, tiny.LLAMA), logits(model, tiny.LLAMA))
    loaded.load_adapter(tmp_path, "again")
    assert len(loaded.base_model.model.model.layers) == 4
    for ranges in ([(0, 2), (0, 2)], None):
        before = set(loaded.state_dict())
        if ranges:
            with pytest.raises(ValueError, match="every adapter of it has to be made for the same"):
                loaded.add_adapter("other", config(ranges))
            assert set(loaded.state_dict()) == before
    twin = copy.deepcopy(loaded)
    assert torch.equal(logits(twin, tiny.LLAMA), logits(model, tiny.LLAMA))
    plain = twin.unload()
    assert torch.equal(logits(plain, tiny.LLAMA), logits(tiny.LLAMA.build(), tiny.LLAMA))
    assert [layer.self_attn.layer_idx for layer in plain.model.layers] == [0, 1]


def test_every_copy_is_merged_into_a_weight_of_its_own_or_not_at_all():
    model = replicated()
    randomise(model)
    expected = logits(model, tiny.LLAMA)
    with pytest.raises(ValueError, match="its weight is tied"):
        model.merge_adapter()
    assert torch.equal(logits(model, tiny.LLAMA), expected)


@pytest.mark.parametrize("ranges", [[(0, 3)], [(1, 1)], [(-1, 1)]])
def test_ranges_that_the_model_does_not_have_leave_it_as_it_was(ranges):
    model = tiny.LLAMA.build()
    with pytest.raises(ValueError, match="layers of this model go from 0 to 2"):
        get_peft_model(model, config(ranges))
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(model, LoraConfig(target_modules=["nothing"], layer_replication=RANGES))
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert torch.equal(logits(model, tiny.LLAMA), logits(tiny.LLAMA.build(), tiny.LLAMA))


@pytest.mark.parametrize("value", [[(0,)], "01", [(0, 1.5)], 3])
def test_what_is_no_list_of_ranges_is_refused(value):
    with pytest.raises(ValueError, match="should be a list of pairs"):
        LoraConfig(layer_replication=value)


@pytest.mark.parametrize("base", [tiny.T5, tiny.CONV], ids=lambda b: b.name)
def test_models_without_one_list_of_layers_are_refused(base):
    with pytest.raises(ValueError, match="needs a model with one list of"):
        get_peft_model(base.build(), LoraConfig(target_modules=list(base.targets), layer_replication=RANGES))


@pytest.mark.parametrize("base", [tiny.BERT, tiny.GPT2], ids=lambda b: b.name)
def test_other_architectures(base):
    model = get_peft_model(
        base.build(), LoraConfig(target_modules=list(base.targets), layer_replication=RANGES, task_type=base.task_type)
    ).eval()
    plain = logits(model, base)
    randomise(model)
    assert (logits(model, base) - plain).abs().max() > 1e-3
