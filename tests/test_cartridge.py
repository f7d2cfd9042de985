"""Cartridges: frozen tokens, starts from a text's cache, composing, and training that goes on from files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tiny
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from peft.core.prompts import PromptTable
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from settings import logits

TEXT = torch.tensor([[5, 11, 29, 3, 17, 42, 8]])


def model_of(base=tiny.LLAMA, tokens=7, frozen=2) -> PeftModel:
    config = CartridgeConfig(task_type=base.task_type, num_virtual_tokens=tokens, num_frozen_tokens=frozen)
    return get_peft_model(base.build(), config).eval()


def train(model, base=tiny.LLAMA, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**base.inputs()).logits.pow(2).mean().backward()
        optimizer.step()


def cache_of(base, ids=TEXT):
    with torch.no_grad():
        return base.build().eval()(input_ids=ids, use_cache=True).past_key_values


@pytest.mark.parametrize("base", [tiny.LLAMA, tiny.GPT2], ids=lambda b: b.name)
def test_a_cartridge_of_a_text_stands_for_the_text(base):
    """Before training the model reads its input as if the text had been read before."""
    model, inputs = model_of(base), base.inputs()
    ids = inputs["input_ids"]
    table = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache_of(base))
    assert torch.equal(table, model.prompt_encoder["default"]())
    assert torch.equal(table, prompt_embeddings_from_past_key_values(cache_of(base), num_virtual_tokens=7))
    legacy = [(layer.keys, layer.values) for layer in cache_of(base).layers]
    assert torch.equal(table, initialize_kv_prefix_from_past_key_values(model, past_key_values=legacy))
    with torch.no_grad():
        whole = base.build().eval()(input_ids=torch.cat([TEXT.expand(len(ids), -1), ids], dim=1)).logits[:, 7:]
        torch.testing.assert_close(model(input_ids=ids).logits, whole, atol=1e-5, rtol=1e-4)


class Tokenizer:
    chat_template = None

    def __call__(self, text, return_tensors, truncation, max_length):
        return {"input_ids": TEXT[:, : max_length if truncation else None]}

    def apply_chat_template(self, messages, **options):
        assert messages[0]["role"] == "system" and options["tokenize"]
        return TEXT.flip(1)


def test_a_start_from_a_text():
    model = model_of(tokens=4)
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    tokenizer, wanted = Tokenizer(), prompt_embeddings_from_past_key_values(cache_of(tiny.LLAMA), num_virtual_tokens=4)
    torch.testing.assert_close(initialize_kv_prefix_from_text(model, tokenizer, text="a text"), wanted)
    assert model.active_adapters == ["default", "lora"]
    tokenizer.chat_template = "{{ messages }}"
    chat = prompt_embeddings_from_past_key_values(cache_of(tiny.LLAMA, TEXT.flip(1)), num_virtual_tokens=4)
    torch.testing.assert_close(initialize_kv_prefix_from_text(model, tokenizer, text="a text"), chat)
    found = initialize_kv_prefix_from_text(
        model, tokenizer, text="a text", use_chat_template=False, adapter_name="default"
    )
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="has 3 tokens, but adapter 'default' has 4"):
        initialize_kv_prefix_from_text(model, tokenizer, text="a text", max_length=3)
    prefix = get_peft_model(tiny.LLAMA.build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    torch.testing.assert_close(
        initialize_kv_prefix_from_text(prefix, tokenizer, text="a", use_chat_template=False), wanted
    )


@pytest.mark.parametrize("frozen", [0, 2, 7])
def test_frozen_tokens_stay_and_training_goes_on_from_either_file(frozen, tmp_path):
    model = model_of(frozen=frozen)
    start = model.prompt_encoder["default"]().detach().clone()
    train(model) if frozen < 7 else None
    table = model.prompt_encoder["default"]().detach()
    assert torch.equal(table[:frozen], start[:frozen])
    assert bool((table[frozen:] != start[frozen:]).all())
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], table)
    expected = logits(model, tiny.LLAMA)
    used = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path)
    assert type(used.prompt_encoder["default"]) is PromptTable
    for with_second_file in (True, False):  # the peer writes the table alone
        read = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path, is_trainable=True)
        assert torch.equal(logits(read, tiny.LLAMA), expected), with_second_file
        train(read) if frozen < 7 else None
        assert torch.equal(read.prompt_encoder["default"]()[:frozen], start[:frozen])
        parameters = {n: id(p) for n, p in read.named_parameters()}
        read.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(logits(read, tiny.LLAMA), expected)
        assert {n: id(p) for n, p in read.named_parameters()} == parameters  # optimisers stay valid
        (tmp_path / "adapter_training.safetensors").unlink(missing_ok=True)


def test_a_table_that_does_not_fit_leaves_the_adapter_as_it_was(tmp_path):
    model, other = model_of(tokens=7), model_of(tokens=5)
    other.save_pretrained(tmp_path)
    (tmp_path / "adapter_training.safetensors").unlink()
    before = model.prompt_encoder["default"]
    with pytest.raises(ValueError, match="shape|\\(5"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.prompt_encoder["default"] is before
    train(model)


def test_composing(tmp_path):
    for name, tokens in (("a", 4), ("b", 3)):
        model = model_of(tokens=tokens)
        train(model)
        model.save_pretrained(tmp_path / name)
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "c")
    both = [load_file(tmp_path / n / "adapter_model.safetensors")["prompt_embeddings"] for n in "abc"]
    assert torch.equal(both[2], torch.cat(both[:2]))
    values = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert values["num_virtual_tokens"] == 7 and values["num_frozen_tokens"] == 2
    read = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path / "c")
    assert torch.equal(read.prompt_encoder["default"](), both[2])
    model_of(tiny.GPT2).save_pretrained(tmp_path / "gpt2")
    get_peft_model(tiny.LLAMA.build(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    for paths, message in (
        (["a"], "at least two"),
        (["a", "lora"], "no cartridge, but an adapter of type LORA"),
        (["a", "gpt2"], "different base models"),
    ):
        with pytest.raises(ValueError, match=message):
            compose_cartridge_adapters([tmp_path / p for p in paths], output_path=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_wrong_input():
    for options in ({"num_frozen_tokens": -1}, {"num_frozen_tokens": 5}):
        with pytest.raises(ValueError, match="num_frozen_tokens"):
            CartridgeConfig(num_virtual_tokens=4, **options)
    model, cache = model_of(tokens=7), cache_of(tiny.LLAMA)
    tokens = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    prompt = get_peft_model(tiny.LLAMA.build(), PromptTuningConfig(**tokens))
    made = get_peft_model(tiny.LLAMA.build(), PrefixTuningConfig(prefix_projection=True, **tokens))
    none = SimpleNamespace(layers=[SimpleNamespace(keys=None, values=None)])
    for target, values, message in (
        (model, {"num_virtual_tokens": 6}, "`num_virtual_tokens` is 6"),
        (model, {"adapter_name": "defualt"}, "did you mean 'default'"),
        (model_of(tokens=8), {}, "has 7 tokens, but adapter 'default' has 8"),
        (model, {"past_key_values": cache_of(tiny.LLAMA, TEXT.expand(2, -1))}, "a batch of 2"),
        (model, {"past_key_values": cache_of(tiny.GPT2)}, "same base model"),
        (model, {"past_key_values": []}, "is empty"),
        (model, {"past_key_values": none}, "is empty"),
        (prompt, {}, "no adapter is active that is one"),
        (made, {}, "prefix_projection=False"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize_kv_prefix_from_past_key_values(target, **{"past_key_values": cache, **values})
    with pytest.raises(ValueError, match="holds 7 tokens"):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=9)
