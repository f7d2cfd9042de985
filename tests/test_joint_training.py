"""Several tasks trained together on one frozen base: rows that name several adapters, with shared and private parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import tiny
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, PTuningV2Config, get_peft_model
from settings import outputs, randomise

TASKS = ("mood", "topic")
ROWS: list[Any] = [("shared", "mood"), ("shared", "topic"), "topic", ("shared", "mood"), "shared", "__base__"]


def classifier() -> PeftModel:
    """Prompts that two tasks share, without a head, and a private part with a head for each: deep prompts, and LoRA."""
    shared = PTuningV2Config("SEQ_CLS", num_virtual_tokens=[3, 2], modules_to_save=[])
    model = get_peft_model(tiny.BERT.build(), shared, "shared")
    model.add_adapter("mood", PTuningV2Config("SEQ_CLS", num_virtual_tokens=4, layers=[1], reparameterization="mlp"))
    model.add_adapter("topic", LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    for seed, name in enumerate(("shared", *TASKS)):
        randomise(model, name, seed)
    return model.eval()


def generator(base: tiny.Tiny) -> PeftModel:
    """A prefix, tokens at the input and LoRA."""
    model = get_peft_model(base.build(), PrefixTuningConfig(base.task_type, num_virtual_tokens=4), "prefix")
    model.add_adapter("tokens", PromptTuningConfig(base.task_type, num_virtual_tokens=3))
    model.add_adapter("lora", LoraConfig(task_type=base.task_type, target_modules=list(base.targets)))
    for seed, name in enumerate(("prefix", "tokens", "lora")):
        randomise(model, name, seed)
    return model.eval()


def alone(model: PeftModel, names: Any, inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    single = {k: v[row : row + 1] for k, v in inputs.items()}
    if names == "__base__":
        with model.disable_adapter():
            return outputs(model, single)
    model.set_adapter([names] if isinstance(names, str) else list(names))
    return outputs(model, single)


def test_shared_and_private_parts_learn_from_their_rows_alone():
    reference, model = classifier(), classifier()
    inputs = tiny.BERT.inputs(rows=len(ROWS))
    inputs["attention_mask"][2:4, -2:] = 0
    rows = []
    for i, names in enumerate(ROWS):
        rows.append(alone(reference, names, inputs, i))
        if i < 4:  # rows of "shared" alone and of none are not trained on
            rows[-1].pow(2).sum().backward()
    model.set_requires_grad(["shared", *TASKS])
    model.train()
    out = model(**inputs, adapter_names=ROWS, allow_mixed_training=True).logits
    torch.testing.assert_close(out.detach(), torch.cat(rows).detach(), atol=2e-6, rtol=1e-5)
    out[:4].pow(2).sum().backward()
    expected = dict(reference.named_parameters())
    reached = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)
            reached |= {part for part in ("shared", *TASKS) if f".{part}." in name and parameter.grad.any()}
    assert reached == {"shared", *TASKS}


def test_an_empty_list_of_modules_is_no_head_and_no_warning(tmp_path, recwarn):
    tiny.BERT.build().bert.save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")  # a new head
    recwarn.clear()
    model = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=[]), "shared"
    )
    assert not recwarn.list and not any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    model.add_adapter("mood", LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(tmp_path / "both")
    for name, has_head in (("shared", False), ("mood", True)):
        keys = load_file(tmp_path / "both" / name / "adapter_model.safetensors")
        assert any("classifier" in key for key in keys) is has_head
    read = PeftModel.from_pretrained(tiny.BERT.build(), tmp_path / "both" / "shared", strict=True)
    assert read.peft_config["default"].modules_to_save == []


def test_rows_of_one_task_give_the_other_no_gradient():
    model = classifier().train()
    model.set_requires_grad(["shared", *TASKS])
    model(
        **tiny.BERT.inputs(), adapter_names=[("shared", "mood")] * 4, allow_mixed_training=True
    ).logits.sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any(".shared." in n for n in with_gradient) and any(".mood." in n for n in with_gradient)
    assert not any(".topic." in n for n in with_gradient)


def test_trained_together_saved_and_used_apart(tmp_path):
    model = classifier()
    model.set_requires_grad(["shared", *TASKS])
    inputs = tiny.BERT.inputs()
    names = [("shared", "mood"), ("shared", "topic")] * 2
    labels = torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    model.train()
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=labels, adapter_names=names, allow_mixed_training=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = outputs(model, inputs, adapter_names=names)
        read = PeftModel.from_pretrained(tiny.BERT.build(), tmp_path / "shared", "shared")
        for task in TASKS:
            read.load_adapter(tmp_path / task, task)
        for row, entry in enumerate(names):  # switched
            torch.testing.assert_close(alone(read, entry, inputs, row)[0], expected[row], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(outputs(read, inputs, adapter_names=names), expected, atol=2e-6, rtol=1e-5)  # mixed


@pytest.mark.parametrize("base", [tiny.LLAMA, tiny.GPT2, tiny.T5], ids=lambda b: b.name)
def test_a_prefix_tokens_and_lora_together_in_rows_of_one_batch(base):
    model = generator(base)
    names: list[Any] = [("prefix", "lora"), ("tokens", "prefix"), ["prefix", "tokens", "lora"], "__base__"]
    inputs = base.inputs()
    with torch.no_grad():
        rows = [alone(model, entry, inputs, i) for i, entry in enumerate(names)]
        mixed = outputs(model, inputs, adapter_names=names)
    torch.testing.assert_close(mixed, torch.cat(rows), atol=5e-6, rtol=1e-5)
    inputs.pop("decoder_input_ids", None)
    for beams in (1, 2):
        greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        batch = model.generate(**inputs, adapter_names=names, **greedy)
        for i, entry in enumerate(names):
            single = {k: v[i : i + 1] for k, v in inputs.items()}
            assert torch.equal(model.generate(**single, adapter_names=[entry], **greedy)[0], batch[i]), entry
            if entry != "__base__":
                model.set_adapter(list(entry))
                assert torch.equal(model.generate(**single, **greedy)[0], batch[i]), entry


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([("shared", "modo"), *["mood"] * 3], "'modo' .did you mean 'mood'"),
        ([("shared", "__base__"), *["mood"] * 3], "is the plain model: leave it out there"),
        ([("shared", "shared"), *["mood"] * 3], "names an adapter twice"),
        ([(), *["mood"] * 3], "or a tuple of names for a row"),
        ([("shared", 1), *["mood"] * 3], "or a tuple of names for a row"),
        (("shared", "mood"), "has 2 names, but the batch has 4 rows"),
        (
            [("mood", "topic"), *["mood"] * 3],
            "'mood', 'topic' all have their own Linear.*make it with modules_to_save=...",
        ),
    ],
)
def test_wrong_rows_say_what_to_change(names, message):
    model = classifier()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        outputs(model, tiny.BERT.inputs(), adapter_names=names)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        outputs(model, tiny.BERT.inputs(), adapter_names=["mood"] * 4)
