"""Prefixes and virtual tokens: files, transformers' own loading, what acts together, starts, and wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
)

import tiny
from peft import (
    CartridgeConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.core.prompts import PromptTable
from settings import logits, outputs, randomise

SHAPE = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
METHODS = {
    "prefix": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
    "p-tuning": lambda **kw: PromptEncoderConfig(encoder_hidden_size=7, **kw),
    "p-tuning-lstm": lambda **kw: PromptEncoderConfig(
        encoder_hidden_size=7, encoder_reparameterization_type="LSTM", **kw
    ),
    "projection": lambda **kw: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=7, **kw),
    "p-tuning-v2": lambda **kw: PTuningV2Config(reparameterization="embedding", **kw),
    "p-tuning-v2-mlp": lambda **kw: PTuningV2Config(reparameterization="mlp", encoder_hidden_size=7, **kw),
    "multitask": MultitaskPromptTuningConfig,
    "cartridge": CartridgeConfig,
}
MADE = ["p-tuning", "p-tuning-lstm", "projection", "p-tuning-v2-mlp"]  # by a network, while they train
PREFIXES = ("prefix", "projection", "p-tuning-v2", "p-tuning-v2-mlp", "cartridge")
every_method = pytest.mark.parametrize("method", METHODS)


def config(method: str, base: tiny.Tiny, tokens: int = 5, **options: Any) -> Any:
    return METHODS[method](task_type=base.task_type, num_virtual_tokens=tokens, **options)


def fresh(method: str, base: tiny.Tiny, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base.build(), config(method, base, **options)).eval()


# -- files ------------------------------------------------------------------------------------------------------------


def train(model: PeftModel, base: tiny.Tiny, steps: int, rate: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = outputs(model, base.inputs()).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", MADE)
def test_the_file_holds_the_table_and_training_goes_on_from_what_makes_it(method, tmp_path):
    whole = fresh(method, tiny.BERT)
    straight = train(whole, tiny.BERT, 6)
    first = fresh(method, tiny.BERT)
    begun = train(first, tiny.BERT, 3)
    first.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"
    }  # fmt: skip
    expected = logits(first, tiny.BERT)

    used = PeftModel.from_pretrained(tiny.BERT.build(), tmp_path)
    assert type(used.prompt_encoder["default"]) is PromptTable
    torch.testing.assert_close(logits(used, tiny.BERT), expected, atol=1e-6, rtol=1e-5)

    resumed = PeftModel.from_pretrained(tiny.BERT.build(), tmp_path, is_trainable=True)
    assert type(resumed.prompt_encoder["default"]) is not PromptTable
    assert begun + train(resumed, tiny.BERT, 3) == straight
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name

    other = fresh(method, tiny.BERT)
    train(other, tiny.BERT, 1)
    kept = dict(other.named_parameters())
    other.load_adapter(tmp_path, "default", is_trainable=True)  # as the Trainer resumes
    assert {n: id(p) for n, p in other.named_parameters()} == {n: id(p) for n, p in kept.items()}
    assert torch.equal(logits(other, tiny.BERT), expected)


@pytest.mark.parametrize("method", MADE)
def test_without_the_second_file_training_goes_on_from_the_table(method, tmp_path):
    model = fresh(method, tiny.BERT)
    train(model, tiny.BERT, 2)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_training.safetensors").unlink()
    expected = logits(model, tiny.BERT)
    read = PeftModel.from_pretrained(tiny.BERT.build(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(read, tiny.BERT), expected, atol=1e-6, rtol=1e-5)
    losses = train(read, tiny.BERT, 3)
    assert losses[-1] < losses[0]
    with pytest.warns(UserWarning, match="make it anew"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder" in n] == [
        "base_model.peft_prompts.prompt_encoder.default.embedding.weight"
    ]


def test_a_second_file_that_no_longer_fits_is_removed(tmp_path):
    fresh("projection", tiny.BERT).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_training.safetensors").exists()
    fresh("prefix", tiny.BERT).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_training.safetensors").exists()


@pytest.mark.parametrize("method", MADE)
def test_a_gathered_state_dict_is_folded_too(method, tmp_path):
    model = fresh(method, tiny.LLAMA)
    train(model, tiny.LLAMA, 1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = logits(model, tiny.LLAMA)
    randomise(model)
    model.save_pretrained(tmp_path, state_dict=state)
    read = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path)
    torch.testing.assert_close(logits(read, tiny.LLAMA), expected, atol=1e-6, rtol=1e-5)


# -- transformers' own loading ----------------------------------------------------------------------------------------


def saved_base(folder: Path, labels: int | None, cls: Any = BertForSequenceClassification) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, **({} if labels is None else {"num_labels": labels}))
    (BertModel(config) if labels is None else cls(config)).save_pretrained(folder)
    return folder


@every_method
@pytest.mark.parametrize(("has_head", "labels"), [(True, 2), (True, 5), (False, 2), (False, 5)])
def test_transformers_loads_the_folder_head_included(method, has_head, labels, tmp_path):
    base = saved_base(tmp_path / "base", labels if has_head else None)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
    model = get_peft_model(model, config(method, tiny.BERT)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter" / "none", ignore_errors=True)
    expected = logits(model, tiny.BERT)
    for cls in (BertForSequenceClassification, AutoModelForSequenceClassification):
        read = cls.from_pretrained(tmp_path / "adapter")
        assert type(read) is BertForSequenceClassification
        assert expected.shape == (4, labels)
        torch.testing.assert_close(logits(read, tiny.BERT), expected, atol=1e-6, rtol=1e-5)


@every_method
def test_transformers_loads_token_classifiers_and_causal_models(method, tmp_path):
    saved_base(tmp_path / "tagger", 3, BertForTokenClassification)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "tagger")
    options = {"num_virtual_tokens": 5}
    model = get_peft_model(model, METHODS[method](task_type="TOKEN_CLS", **options)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "tags")
    read = AutoModelForTokenClassification.from_pretrained(tmp_path / "tags")
    assert read(**tiny.BERT.inputs()).logits.shape == (4, 6, 3)
    torch.testing.assert_close(logits(read, tiny.BERT), logits(model, tiny.BERT), atol=1e-6, rtol=1e-5)

    tiny.LLAMA.build().save_pretrained(tmp_path / "llama")
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    causal = get_peft_model(causal, METHODS[method](task_type="CAUSAL_LM", **options)).eval()
    randomise(causal)
    causal.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    torch.testing.assert_close(logits(again, tiny.LLAMA), logits(causal, tiny.LLAMA), atol=1e-5, rtol=1e-5)
    greedy = {**tiny.LLAMA.inputs(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(**greedy), causal.generate(**greedy))


@every_method
def test_what_transformers_saves_is_read_by_both(method, tmp_path):
    base = saved_base(tmp_path / "base", 3)
    model = BertForSequenceClassification.from_pretrained(base)
    model.add_adapter(config(method, tiny.BERT))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = logits(model, tiny.BERT)
    assert not (tmp_path / "adapter" / "config.json").exists()
    read = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(read, tiny.BERT), expected, atol=1e-6, rtol=1e-5)
    native = BertForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(native, tiny.BERT), expected, atol=1e-6, rtol=1e-5)


# -- together ---------------------------------------------------------------------------------------------------------


def three(base: tiny.Tiny) -> PeftModel:
    """A prefix, virtual tokens and LoRA on one model."""
    model = fresh("prefix", base)
    model.add_adapter("tokens", config("prompt", base, tokens=3))
    model.add_adapter("lora", LoraConfig(task_type=base.task_type, target_modules=list(base.targets)))
    for seed, name in enumerate(("default", "tokens", "lora")):
        randomise(model, name, seed)
    return model


@pytest.mark.parametrize("base", [tiny.BERT, tiny.GPT2, tiny.LLAMA, tiny.T5], ids=lambda b: b.name)
def test_rows_with_a_prefix_with_tokens_with_lora_and_with_none_in_one_batch(base):
    model = three(base)
    names = ["tokens", "__base__", "lora", "default"]
    alone = []
    for row, name in enumerate(names):
        single = {k: v[row : row + 1] for k, v in base.inputs().items()}
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    alone.append(outputs(model, single))
            else:
                model.set_adapter(name)
                alone.append(outputs(model, single))
    mixed = logits(model, base, adapter_names=names)
    torch.testing.assert_close(mixed, torch.cat(alone), atol=5e-6, rtol=1e-5)
    if base.task_type == "CAUSAL_LM":
        mask = torch.ones(4, 6, dtype=torch.long)
        mask[2, :3] = 0
        inputs = {"input_ids": base.inputs()["input_ids"] * mask, "attention_mask": mask}
        for beams in (1, 2):
            greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
            batch = model.generate(**inputs, adapter_names=names, **greedy)
            for row, name in enumerate(names):
                single = {k: v[row : row + 1] for k, v in inputs.items()}
                assert torch.equal(model.generate(**single, adapter_names=[name], **greedy)[0], batch[row]), name


def test_a_prefix_and_lora_active_together():
    base = tiny.LLAMA
    model = three(base)
    model.set_adapter(["default", "lora"])
    both = logits(model, base)
    single = fresh("prefix", base)
    randomise(single, "default", 0)
    merged = get_peft_model(base.build(), LoraConfig(task_type="CAUSAL_LM", target_modules=list(base.targets))).eval()
    randomise(merged, "default", 2)
    merged = merged.merge_and_unload()
    second = get_peft_model(merged, config("prefix", base)).eval()
    randomise(second, "default", 0)
    torch.testing.assert_close(logits(second, base), both, atol=2e-5, rtol=1e-4)
    assert (logits(single, base) - both).abs().max() > 1e-3
    model.merge_adapter(["lora"])
    torch.testing.assert_close(logits(model, base), both, atol=2e-5, rtol=1e-4)


def test_prefix_and_tokens_active_together_generate_the_same_with_and_without_cache():
    base = tiny.LLAMA
    model = three(base)
    model.set_adapter(["default", "tokens"])
    greedy = {**base.inputs(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**greedy), model.generate(**greedy, use_cache=False))


def test_lora_first_and_a_prefix_added():
    base = tiny.BERT
    model = get_peft_model(base.build(), LoraConfig(task_type="SEQ_CLS", target_modules=list(base.targets))).eval()
    model.add_adapter("prefix", config("prefix", base))
    randomise(model, "prefix", 1)
    model.set_adapter("prefix")
    alone = fresh("prefix", base)
    randomise(alone, "default", 1)
    torch.testing.assert_close(logits(model, base), logits(alone, base))


def test_both_kinds_in_files_of_one_model(tmp_path):
    base = tiny.BERT
    model = three(base)
    model.save_pretrained(tmp_path)
    keys = {n: set(load_file(tmp_path / n / "adapter_model.safetensors")) for n in ("tokens", "lora")}
    assert all(k.startswith("base_model.model.") for k in keys["lora"])
    assert "base_model.classifier.weight" in keys["tokens"]
    for name in ("tokens", "lora"):
        model.set_adapter(name)
        read = PeftModel.from_pretrained(base.build(), tmp_path / name)
        torch.testing.assert_close(logits(read, base), logits(model, base))


# -- how it is used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2Config, OPTConfig])
def test_generation_beyond_a_table_of_positions_says_so(config):
    """Not an index that is out of range somewhere inside the model; tables that begin with an offset have as many positions as they say."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    if config is OPTConfig:
        sizes = {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 32,
        }
        sizes["max_position_embeddings"] = 24
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        config(**sizes, vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=None)
    )
    model = get_peft_model(base, PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=4)).eval()
    inputs = {"input_ids": torch.randint(3, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert model.generate(**inputs, max_new_tokens=15, do_sample=False).shape == (
        2,
        21,
    )  # the last one is not read again
    with pytest.raises(
        ValueError, match="21 tokens and the adapter 4 virtual ones, but the model has only 24 positions"
    ):
        model.generate(**inputs, max_new_tokens=16, do_sample=False)


@every_method
@pytest.mark.parametrize("base", [tiny.GPT2, tiny.LLAMA], ids=lambda b: b.name)
def test_embeddings_from_the_user_and_positions_from_the_user(method, base):
    model = fresh(method, base)
    randomise(model)
    inputs = base.inputs()
    expected = logits(model, base)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(6)[None].expand(4, -1)
    with torch.no_grad():
        count = model(inputs_embeds=embeds).logits.shape[1]
        torch.testing.assert_close(model(inputs_embeds=embeds).logits[:, -6:], expected)
        torch.testing.assert_close(model(**inputs, position_ids=positions).logits[:, -6:], expected)
        assert count == (6 if method in PREFIXES else 11)


def test_the_projection_is_computed_once_a_step_whatever_the_batch():
    model = fresh("projection", tiny.LLAMA)
    calls = []
    model.prompt_encoder["default"].transform.register_forward_hook(lambda m, a, out: calls.append(out.shape))
    outputs(model, tiny.LLAMA.inputs()).sum().backward()
    assert calls == [(5, 2 * 2 * 2 * 8)]
    with torch.no_grad():
        calls.clear()
        model.generate(**tiny.LLAMA.inputs(), max_new_tokens=4, min_new_tokens=4)
    assert len(calls) == 1


def test_labels_of_virtual_tokens_do_not_count():
    model = fresh("prompt", tiny.LLAMA)
    randomise(model)
    inputs = tiny.LLAMA.inputs()
    out = model(**inputs, labels=inputs["input_ids"])
    assert out.logits.shape[1] == 11
    expected = torch.nn.functional.cross_entropy(out.logits[:, 4:-1].flatten(0, 1), inputs["input_ids"].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_a_manual_loop_with_a_cache():
    model = fresh("prompt", tiny.LLAMA)
    randomise(model)
    ids = tiny.LLAMA.inputs()["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
        raw = model.get_base_model()
        start = raw(input_ids=ids[:, :-1], use_cache=True)
        end = raw(input_ids=ids[:, -1:], past_key_values=start.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, whole)
    torch.testing.assert_close(end, whole)
    assert start.past_key_values.get_seq_length() == 5 + 1  # the virtual tokens are not in it, the next token is by now


def test_rows_padded_at_the_right_are_pooled_at_their_last_token():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    small = LlamaConfig(**{k: v for k, v in SHAPE.items() if "dropout" not in k}, pad_token_id=0, num_labels=3)
    model = get_peft_model(LlamaForSequenceClassification(small), config("prompt", tiny.BERT)).eval()
    ids = tiny.BERT.inputs()["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 3), value=0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = model(input_ids=padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(found, expected)


# -- starts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "is", "it", "good"])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_start_from_a_text_repeats_or_cuts_it(tokenizer):
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "is it good",
        "tokenizer_name_or_path": tokenizer,
    }
    for count, ids in ((5, [1, 2, 3, 1, 2]), (2, [1, 2])):
        model = fresh("prompt", tiny.BERT, tokens=count, **options)
        words = model.get_input_embeddings().weight[ids]
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, words)


def test_a_start_from_the_vocabulary():
    model = fresh("prompt", tiny.BERT, prompt_tuning_init="SAMPLE_VOCAB")
    words = model.get_input_embeddings().weight
    assert all((words == row).all(1).any() for row in model.prompt_encoder["default"].embedding.weight)


def test_prefix_starts():
    projected = fresh("projection", tiny.LLAMA).prompt_encoder["default"]
    plain = fresh("prefix", tiny.LLAMA).prompt_encoder["default"]
    torch.testing.assert_close(projected(), plain())  # both from the same tokens, the projection at zero
    assert not projected.transform[2].weight.any()
    random = fresh("projection", tiny.LLAMA, prefix_init="peer").prompt_encoder["default"]
    assert random.transform[2].weight.any() and random.start is None


# -- wrong input ------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("count", [0, -1, 64, 1000, None, True, 2.5])
def test_impossible_numbers_of_virtual_tokens(method, count):
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        get_peft_model(tiny.BERT.build(), config(method, tiny.BERT, tokens=count))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixTuningConfig(prefix_init="words"), "'tokens' or 'peer', got 'words'"),
        (lambda: PromptTuningConfig(prompt_tuning_init="TXT"), "did you mean 'TEXT'"),
        (lambda: PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"), "tokenizer_name_or_path"),
        (lambda: PromptTuningConfig(prompt_tuning_init="TEXT", tokenizer_name_or_path="a"), "prompt_tuning_init_text"),
        (lambda: PromptTuningConfig(tokenizer_kwargs={"use_fast": True}), "tokenizer_kwargs"),
        (lambda: PromptEncoderConfig(encoder_reparameterization_type="GRU"), "Use one of MLP, LSTM"),
        (lambda: PromptEncoderConfig(encoder_dropout=1.0), "encoder_dropout"),
    ],
)
def test_wrong_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_method
def test_an_adapter_of_another_size_is_refused(method, tmp_path):
    fresh(method, tiny.BERT).save_pretrained(tmp_path)
    larger = BertForSequenceClassification(BertConfig(**{**SHAPE, "hidden_size": 48, "num_hidden_layers": 3}))
    keys = list(larger.state_dict())
    with pytest.raises(ValueError, match="made for another model"):
        PeftModel.from_pretrained(larger, tmp_path)
    assert list(larger.state_dict()) == keys and not hasattr(larger, "peft_config")


@every_method
def test_an_adapter_of_another_architecture_is_refused(method, tmp_path):
    fresh(method, tiny.LLAMA).save_pretrained(tmp_path)
    sizes = {k: v for k, v in tiny.LLAMA.build().config.to_dict().items() if k in MistralConfig().to_dict()}
    other = MistralForCausalLM(MistralConfig(**{**sizes, "model_type": "mistral", "architectures": None}))
    with pytest.raises(ValueError, match=r"trained in a LlamaForCausalLM \(llama\)"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not hasattr(other, "peft_config")


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("base", [tiny.BERT, tiny.GPT2], ids=lambda b: b.name)
@pytest.mark.parametrize("grad", [True, False])
def test_too_long_an_input_says_how_long_it_may_be(method, base, grad):
    model = fresh(method, base)
    room = model.config.max_position_embeddings - 5
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match=f"Truncate the input to {room} tokens"):
            model(input_ids=torch.ones(1, room + 1, dtype=torch.long))
        model(input_ids=torch.ones(1, room, dtype=torch.long))


@every_method
@pytest.mark.parametrize("base", [tiny.LLAMA, tiny.GPT2], ids=lambda b: b.name)
def test_more_virtual_tokens_than_the_model_was_made_for_are_refused(method, base):
    model = base.build()
    limit = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"Use fewer than {limit}"):
        get_peft_model(model, config(method, base, tokens=limit))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 0}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": -1}),
        ("prompt", {"num_transformer_submodules": 3}),
        ("prompt", {"num_transformer_submodules": -1}),
        ("p-tuning-lstm", {"encoder_num_layers": 0}),
    ],
)
def test_impossible_sizes_are_refused(method, options):
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}` should be"):
        fresh(method, tiny.GPT2, **options)


def test_tokens_and_embeddings_at_once_are_refused():
    model = fresh("prompt", tiny.BERT)
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_models_outside_transformers_are_refused():
    with pytest.raises(NotImplementedError, match="a model of transformers"):
        inject_adapter_in_model(PrefixTuningConfig(num_virtual_tokens=4), torch.nn.Sequential(torch.nn.Linear(2, 2)))
