"""Preparing models: quantised bases, mixed precision, sharding policies, labels, signatures."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import tiny
from peft import (
    LoraConfig,
    cast_mixed_precision_params,
    get_peft_model,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)
from peft.helpers import update_forward_signature, update_signature
from peft.utils.other import _get_submodules, fsdp_auto_wrap_policy


@pytest.mark.parametrize("checkpointing", [True, False])
def test_prepared_for_quantised_training(checkpointing):
    model = prepare_model_for_kbit_training(tiny.LLAMA.build(torch.bfloat16), use_gradient_checkpointing=checkpointing)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing == checkpointing
    model = get_peft_model(model, LoraConfig())
    model.train()
    model(**tiny.LLAMA.inputs()).logits.pow(2).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_prepared_with_non_reentrant_checkpointing():
    model = prepare_model_for_kbit_training(tiny.LLAMA.build(), gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing


def test_mixed_precision_keeps_what_trains_in_float32():
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig())
    cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model(**tiny.LLAMA.inputs()).logits.isfinite().all()


def test_labels_are_shifted():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert shift_tokens_right(labels, 1, 0).tolist() == [[0, 5, 6], [0, 7, 1]]
    with pytest.raises(ValueError, match="pad_token_id has to be defined"):
        shift_tokens_right(labels, None, 0)


def test_the_sharding_policy_keeps_trainable_parts_apart(monkeypatch):
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig())
    policy = fsdp_auto_wrap_policy(model)
    chosen = [n for n, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    blocks = [n for n in chosen if n.endswith((".layers.0", ".layers.1"))]
    assert len(blocks) == 2
    # The adapter's parameters belong to the adapted layer, which reads them, and the frozen weight in it is apart.
    adapted = {n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    assert {n for n in chosen if n not in blocks} == adapted | {f"{n}.base_layer" for n in adapted}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchLayer")
    with pytest.raises(ValueError, match=r"names \['NoSuchLayer'\]"):
        fsdp_auto_wrap_policy(model)


def test_signatures_of_the_base_model():
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig(task_type="CAUSAL_LM"))
    expected = model(**tiny.LLAMA.inputs()).logits
    update_forward_signature(model)
    base = inspect.signature(model.get_base_model().forward)
    assert list(inspect.signature(model.forward).parameters) == list(base.parameters)
    assert torch.equal(model(**tiny.LLAMA.inputs()).logits, expected)
    update_signature(model, "generate")
    assert "generation_config" in inspect.signature(model.generate).parameters
    with pytest.raises(ValueError, match="should be 'forward', 'generate' or 'all'"):
        update_signature(model, "call")


def test_task_classes_take_their_own_order_of_arguments():
    model = get_peft_model(tiny.BERT.build(), LoraConfig(task_type="SEQ_CLS")).eval()
    inputs = tiny.BERT.inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = torch.tensor([0, 1, 0, 1])
    assert torch.equal(model(ids, mask, None, labels).logits, model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(model(ids, mask, None, labels).loss, model(ids, mask, labels=labels).loss)
    with pytest.raises(TypeError, match="both by position and by name"):
        model(ids, mask, attention_mask=mask)
    with pytest.raises(TypeError, match="at most 7 positional"):
        model(ids, mask, *[None] * 6)
    with pytest.raises(ValueError, match="`task_ids` is for multitask prompts"):
        model(ids, task_ids=torch.zeros(4))


def test_parents_and_names_of_modules():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    parent, module, name = _get_submodules(model, "0.0")
    assert parent is model[0] and module is model[0][0] and name == "0"
