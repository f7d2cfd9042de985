"""Tied weights: an embedding and the head that shares its weight are adapted once, merged into both, and stay tied."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from settings import logits, randomise

PLACES = pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=["embedding", "head", "both"]
)
EMBEDDING = "base_model.model.model.embed_tokens"
HEADS = pytest.mark.parametrize("heads", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])


def llama(tied=True):
    return tiny.LLAMA.build(tie_word_embeddings=tied)


def config(targets=("embed_tokens",), **options):
    options = {"ensure_weight_tying": True, "task_type": "CAUSAL_LM", "r": 4, **options}
    return LoraConfig(target_modules=list(targets), **options)


def adapted(targets=("embed_tokens",), scale=0.2, **options):
    model = get_peft_model(llama(), config(targets, **options)).eval()
    randomise(model, scale=scale)
    return model


def shared_layer(model):
    """The adapted one of the two modules."""
    inner = model.base_model.model
    return next(m for m in (inner.model.embed_tokens, inner.lm_head) if getattr(m, "follows", 0) is None)


def by_hand(model):
    """The base model with the change in the weight that both share."""
    plain, layer = llama(), shared_layer(model)
    with torch.no_grad():
        plain.lm_head.weight += layer.get_delta_weight("default")
    assert plain.model.embed_tokens.weight is plain.lm_head.weight
    return plain


@PLACES
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["plain", "dora", "pissa"]
)
def test_the_shared_weight_is_changed_for_both(targets, options):
    targets = [t for t in targets if t != "q_proj"]
    fresh = get_peft_model(llama(), config(targets, **options)).eval()
    torch.testing.assert_close(logits(fresh, tiny.LLAMA), logits(llama(), tiny.LLAMA), atol=1e-5, rtol=1e-5)
    model = adapted(targets, **options)
    torch.testing.assert_close(logits(model, tiny.LLAMA), logits(by_hand(model), tiny.LLAMA), atol=2e-5, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (60 + 32) + 32 * (
        "use_dora" in options and targets[0] == "embed_tokens"
    ) + 60 * ("use_dora" in options and targets[0] == "lm_head")


@PLACES
def test_gradients_are_those_of_the_shared_weight(targets):
    targets = [t for t in targets if t != "q_proj"]
    model = adapted(targets)
    model(**tiny.LLAMA.inputs()).logits.pow(2).sum().backward()
    plain, layer = by_hand(model), shared_layer(model)
    plain(**tiny.LLAMA.inputs()).logits.pow(2).sum().backward()
    gradient = layer.kind.to_matrix(None, plain.lm_head.weight.grad) * layer.scaling["default"]
    a, b = layer.factors("default")
    parameters = dict(layer.named_parameters())
    grad_a, grad_b = (parameters[f"{slot}.default{'' if 'emb' in slot else '.weight'}"].grad for slot in layer._slots())
    torch.testing.assert_close(grad_a, b.T @ gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad_b, gradient @ a.T, atol=1e-4, rtol=1e-4)


@PLACES
def test_merged_for_both_and_taken_out_exactly(targets):
    model = adapted(targets)
    expected, before = logits(model, tiny.LLAMA), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert type(plain.lm_head) is torch.nn.Linear
    assert type(plain.model.embed_tokens) is torch.nn.Embedding


@PLACES
def test_saved_under_both_names_and_loaded_as_one(targets, tmp_path, recwarn):
    model = adapted(targets)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    embedding, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_"
    assert torch.equal(tensors[f"{embedding}A"], tensors[f"{head}B.weight"].T)
    assert torch.equal(tensors[f"{embedding}B"], tensors[f"{head}A.weight"].T)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded, tiny.LLAMA), logits(model, tiny.LLAMA))
    assert not [str(w.message) for w in recwarn if "tensors" in str(w.message)]
    tensors[f"{head}B.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="hold other values for .*lm_head|hold other values for .*embed_tokens"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_transformers_reads_it_by_itself(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config(["lm_head", "q_proj"])).eval()
    randomise(model)
    for embeddings in (True, False):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(alone, tiny.LLAMA), logits(model, tiny.LLAMA))
        alone.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(llama(), tmp_path / "again")
        torch.testing.assert_close(logits(again, tiny.LLAMA), logits(model, tiny.LLAMA))


def test_weights_that_were_untied_since_are_not_merged():
    model = adapted()
    inner = model.base_model.model
    inner.lm_head.base_layer.weight = torch.nn.Parameter(inner.lm_head.weight.detach().clone())
    expected = logits(model, tiny.LLAMA)
    with pytest.raises(ValueError, match="'lm_head' was tied to an adapted module and has a weight of its own now"):
        model.merge_adapter()
    assert torch.equal(logits(model, tiny.LLAMA), expected)
    inner.model.embed_tokens.merge()  # past the model: what follows goes on acting
    torch.testing.assert_close(logits(model, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)


def test_of_several_adapters_each_is_tied_or_not():
    model = adapted()
    with pytest.warns(UserWarning, match=r"'model.embed_tokens' with 'lm_head'.*cannot be merged"):
        model.add_adapter("apart", config(ensure_weight_tying=False))
    model.add_adapter("other", config(["lm_head", "v_proj"], r=2))
    randomise(model, "apart", 2)
    randomise(model, "other", 3)
    names = ["other", "default", "apart", "__base__"]
    rows = []
    for index, name in enumerate(names):
        single = {k: v[index : index + 1] for k, v in tiny.LLAMA.inputs().items()}
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(model(**single).logits)
            else:
                model.set_adapter(name)
                rows.append(model(**single).logits)
    torch.testing.assert_close(logits(model, tiny.LLAMA, adapter_names=names), torch.cat(rows), atol=1e-5, rtol=1e-4)
    model.set_adapter("apart")
    apart = logits(model, tiny.LLAMA)
    plain = llama()
    plain.model.embed_tokens.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    with torch.no_grad():
        plain.model.embed_tokens.weight += model.get_submodule(EMBEDDING).base_layer.get_delta_weight("apart")
    torch.testing.assert_close(apart, logits(plain, tiny.LLAMA), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="its weight is tied"):
        model.merge_adapter()
    model.set_adapter("other")
    expected = logits(model, tiny.LLAMA)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.delete_adapter("other")
    model.set_adapter("apart")
    assert torch.equal(logits(model, tiny.LLAMA), apart)
    assert set(model.unload().state_dict()) == set(llama().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_and_half_precision(dtype):
    model = get_peft_model(llama().to(dtype), config(lora_dropout=0.5)).train()
    randomise(model)
    out = [model(**tiny.LLAMA.inputs()).logits for _ in range(2)]
    assert not torch.equal(*out)
    assert out[0].dtype == dtype
    out[0].float().pow(2).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_combined_and_swapped_adapters_stay_tied(tmp_path):
    model = adapted()
    model.add_adapter("other", config())
    randomise(model, "other", 5)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "cat")
    model.set_adapter("sum")
    summed, plain = logits(model, tiny.LLAMA), llama()
    with torch.no_grad():
        layer = shared_layer(model)
        plain.lm_head.weight += 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
    torch.testing.assert_close(summed, logits(plain, tiny.LLAMA), atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["other"], save_embedding_layers=False)
    model.set_adapter("other")
    expected = logits(model, tiny.LLAMA)
    model.set_adapter("default")
    hotswap_adapter(model, tmp_path / "other", "default")
    assert torch.equal(logits(model, tiny.LLAMA), expected)
    with pytest.warns(UserWarning, match="cannot be merged"):
        model.add_adapter("apart", config(ensure_weight_tying=False))
    with pytest.raises(ValueError, match="only 'default' act on 'lm_head' too"):
        model.add_weighted_adapter(["default", "apart"], [1.0, 1.0], "mixed", "cat")


def test_token_rows_are_swapped_with_tied_heads(tmp_path):
    model = adapted(["q_proj"], trainable_token_indices=[9, 4])
    model.add_adapter("other", config(["q_proj"], trainable_token_indices=[9, 4]))
    randomise(model, "other", 5)
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    expected = logits(model, tiny.LLAMA)
    model.set_adapter("default")
    hotswap_adapter(model, tmp_path / "other", "default")
    assert torch.equal(logits(model, tiny.LLAMA), expected)


def test_rows_and_factors_on_the_same_tied_weight():
    model = adapted(trainable_token_indices=[9, 4, 30])
    expected = logits(model, tiny.LLAMA)
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain, tiny.LLAMA), expected, atol=2e-5, rtol=1e-4)


def test_all_modules_that_share_a_weight_follow():
    base = tiny.T5.build(tie_word_embeddings=True)
    sharing = [n for n, m in base.named_modules() if getattr(m, "weight", None) is base.lm_head.weight]
    assert len(sharing) > 2
    model = get_peft_model(base, config(["lm_head", "q"], task_type="SEQ_2_SEQ_LM")).eval()
    randomise(model, scale=0.05)
    expected = logits(model, tiny.T5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tiny.T5), expected, atol=1e-4, rtol=1e-4)


# modules trained in full -------------------------------------------------------------------------------------------


@HEADS
def test_a_tied_module_trained_in_full_is_one_parameter(heads, tmp_path):
    model = adapted(["q_proj"], modules_to_save=heads)
    inner = model.base_model.model
    copies = [m.modules_to_save["default"].weight for m in (inner.model.embed_tokens, inner.lm_head)]
    assert copies[0] is copies[1]
    assert sum(p.numel() == 60 * 32 for p in model.parameters() if p.requires_grad) == 1
    expected = logits(model, tiny.LLAMA)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low, is_trainable=True)
        assert torch.equal(logits(loaded, tiny.LLAMA), expected)
        inner = loaded.base_model.model
        assert inner.model.embed_tokens.weight is inner.lm_head.weight
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain, tiny.LLAMA), expected)


@HEADS
def test_without_it_the_merged_model_is_no_longer_tied_and_says_so(heads, tmp_path):
    with pytest.warns(UserWarning, match="gets a copy of its own: the model is no longer tied"):
        model = adapted(["q_proj"], modules_to_save=heads, ensure_weight_tying=False)
    expected = logits(model, tiny.LLAMA)
    with pytest.warns(UserWarning, match="config.tie_word_embeddings is set to False"):
        plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tiny.LLAMA), expected)


# what is doubtful --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (llama, {"targets": ["q_proj"]}, "there is nothing to tie"),
        (lambda: llama(False), {}, "there is nothing to tie"),
        (llama, {"ensure_weight_tying": False}, "cannot be merged. Set ensure_weight_tying=True"),
        (
            llama,
            {"targets": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": False},
            "no longer tied",
        ),
    ],
)
def test_doubtful_choices_warn_and_raise_when_strict(base, options, message):
    with pytest.warns(UserWarning, match=message):
        get_peft_model(base(), config(**options))
    model = base()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(**options), strict=True)
    assert list(model.state_dict()) == keys


def test_tied_token_rows_are_tied_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(), config(["q_proj"], trainable_token_indices=[3]))


def test_copies_of_a_layer_are_not_tied():
    """They share their weights too, but each place has an adapter, and a trained norm, of its own."""
    options = {"layer_replication": [[0, 2], [1, 2]], "modules_to_save": ["input_layernorm"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(), config(["q_proj"], ensure_weight_tying=False, **options), strict=True)
    model = get_peft_model(llama(), config(["embed_tokens", "q_proj"], **options))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum("q_proj.lora_A" in n for n in trained) == sum("input_layernorm" in n for n in trained) == 3
    assert type(model.base_model.model.lm_head).__name__ == "TiedLayer"
