"""Single rows of embeddings that are trained: alone, beside another method, and with tied heads."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from settings import logits, randomise

TOKENS = [9, 4, 30]
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def lora(tokens=TOKENS, **options):
    return LoraConfig(
        **{"target_modules": ["q_proj"], "trainable_token_indices": tokens, "task_type": "CAUSAL_LM", **options}
    )


def llama(tied=True):
    return tiny.LLAMA.build(tie_word_embeddings=tied)


def adapted(tied=True, tokens=TOKENS, **options):
    model = get_peft_model(llama(tied), lora(tokens, **options)).eval()
    randomise(model)
    return model


def rows_of(model, name="default"):
    return next(p for n, p in model.named_parameters() if n.endswith(f"trainable_tokens_delta.{name}"))


@TIED
def test_the_rows_are_replaced_and_nothing_else(tied):
    config = TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM")
    model = get_peft_model(llama(tied), config).eval()
    assert torch.equal(logits(model, tiny.LLAMA), logits(llama(tied), tiny.LLAMA))
    rows = rows_of(model)
    assert torch.equal(rows, llama(tied).model.embed_tokens.weight[TOKENS])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.embed_tokens.trainable_tokens_delta.default"
    ]
    randomise(model)
    by_hand = llama(tied)
    with torch.no_grad():
        by_hand.model.embed_tokens.weight[TOKENS] = rows
    torch.testing.assert_close(logits(model, tiny.LLAMA), logits(by_hand, tiny.LLAMA))
    assert config.target_modules == "model.embed_tokens"


@TIED
def test_gradients_are_those_of_the_rows(tied):
    model = adapted(tied)
    by_hand = get_peft_model(llama(tied), LoraConfig(target_modules=["q_proj"])).eval()
    weight = by_hand.base_model.model.model.embed_tokens.weight.requires_grad_()
    with torch.no_grad():
        weight[TOKENS] = rows_of(model)
        own = dict(model.named_parameters())
        for name, parameter in by_hand.named_parameters():
            if "lora" in name:
                parameter.copy_(own[name])
    for net in (model, by_hand):
        net(**tiny.LLAMA.inputs()).logits.pow(2).sum().backward()
    torch.testing.assert_close(rows_of(model).grad, weight.grad[TOKENS], atol=1e-5, rtol=1e-4)


@TIED
def test_merged_rows_are_in_the_weight_and_come_out_exactly(tied):
    model = adapted(tied)
    expected, before = logits(model, tiny.LLAMA), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    rows = rows_of(model).detach().clone()
    plain = model.merge_and_unload()
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    torch.testing.assert_close(plain.model.embed_tokens.weight[TOKENS], rows)
    torch.testing.assert_close(logits(plain, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)


@TIED
def test_saved_once_and_loaded(tied, tmp_path):
    model = adapted(tied)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(t.shape) for k, t in tensors.items() if "lora" not in k] == [(3, 32)]
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path)
    assert torch.equal(logits(loaded, tiny.LLAMA), logits(model, tiny.LLAMA))


@TIED
def test_mixed_batches_equal_each_row_alone(tied):
    model = adapted(tied)
    model.add_adapter("other", lora([5, 9]))
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    randomise(model, "other", 2)
    randomise(model, "plain", 3)
    names = ["other", "default", "__base__", "plain"]
    rows = []
    for index, name in enumerate(names):
        single = {k: v[index : index + 1] for k, v in tiny.LLAMA.inputs().items()}
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                rows.append(model(**single).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**single).logits.detach())
    torch.testing.assert_close(logits(model, tiny.LLAMA, adapter_names=names), torch.cat(rows), atol=2e-6, rtol=1e-5)


def test_tokens_by_module():
    model = adapted(False, {"embed_tokens": [4, 7], "lm_head": [1]})
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "trainable_tokens" in n}
    assert sorted(shapes.values()) == [(1, 32), (2, 32)]
    expected = logits(model, tiny.LLAMA)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([4, 60], "'60' are none of its 60 rows"),
        ([-1], "'-1' are none of its 60 rows"),
        ([4, 4], "each can be given once"),
        ({"embed_toks": [1]}, r"names 'embed_toks', which is no module of the model \(did you mean 'embed_tokens'"),
        ({"norm": [1]}, "'model.norm' is a LlamaRMSNorm, which cannot be adapted"),
    ],
)
def test_tokens_that_are_not_there_are_refused(tokens, message):
    model = llama()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, lora(tokens))
    assert set(model.state_dict()) == keys


@TIED
def test_copies_and_deleted_adapters(tied):
    model = adapted(tied)
    expected = logits(model, tiny.LLAMA)
    twin = copy.deepcopy(model)
    randomise(model, seed=3)
    assert torch.equal(logits(twin, tiny.LLAMA), expected)
    twin.add_adapter("other", lora([1]))
    twin.set_adapter("other")
    twin.delete_adapter("default")
    assert torch.equal(logits(twin, tiny.LLAMA), logits(llama(tied), tiny.LLAMA))
    plain = twin.unload()
    assert set(plain.state_dict()) == set(llama(tied).state_dict())


def test_tokens_of_two_modules_that_share_a_weight():
    same = adapted(True, {"embed_tokens": [4, 7], "lm_head": [4, 7]})
    assert sum("trainable_tokens" in n for n, _ in same.named_parameters()) == 1
    model = llama(True)
    with pytest.raises(
        ValueError, match="other tokens for 'lm_head' than for 'model.embed_tokens', but the two share one w"
    ):
        get_peft_model(model, lora({"embed_tokens": [4, 7], "lm_head": [1]}))
    assert not hasattr(model, "peft_config")


def test_a_file_that_repeats_the_rows_for_the_tied_head_is_read(tmp_path, recwarn):
    config = TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(True), config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (key,) = tensors
    assert key == "base_model.model.model.embed_tokens.trainable_tokens_delta"
    save_file(
        {**tensors, "base_model.model.lm_head.trainable_tokens_delta": tensors[key].clone()},
        tmp_path / "adapter_model.safetensors",
    )
    loaded = PeftModel.from_pretrained(llama(True), tmp_path)
    assert torch.equal(logits(loaded, tiny.LLAMA), logits(model, tiny.LLAMA))
    assert not [w for w in recwarn if "no place" in str(w.message)]
