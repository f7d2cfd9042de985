"""P-tuning v2: chosen layers, lengths and parts against attention written out; conversion from and to prefix tuning; wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForQuestionAnswering,
)
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import BaseModelOutput

import tiny
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PTuningV2Config, get_peft_model
from peft.core.prompt_table import CROSS, ENCODER, MAIN
from peft.core.prompt_tuner import survey
from peft.core.tokens import real_tokens
from peft.helpers import convert_adapter
from settings import logits, randomise
from test_prompt_architectures import GREEDY, TABLE, carrying, ids_of, inputs_of, with_prefix
from test_prompts import SHAPE

ROWS = {row.name: row for row in TABLE}


def adapted(row: Any, attention: str | None = None, **options: Any) -> PeftModel:
    config = PTuningV2Config(task_type=row.task, **{"num_virtual_tokens": 5, **options})
    return get_peft_model(row.build(attention), config).eval()


# -- against attention written out ------------------------------------------------------------------------------------

FRONTS: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
"""Keys and values in front, (heads, length, size), by the identity of the attention layer."""


def written_out(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
) -> Any:
    if id(module) in FRONTS:
        k, v = (t.expand(key.shape[0], -1, -1, -1) for t in FRONTS[id(module)])
        key, value = torch.cat([k, key], 2), torch.cat([v, value], 2)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (k.shape[2], 0))
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


AttentionInterface.register("written_out", written_out)
AttentionMaskInterface.register("written_out", eager_mask)
TABLES = ("position_embeddings", "wpe", "embed_positions")
CASES: list[tuple[str, dict[str, Any], dict[str, dict[int, int]]]] = [
    ("Bert", {"num_virtual_tokens": 3, "layers": [1]}, {MAIN: {1: 3}}),
    ("Bert", {"num_virtual_tokens": [2, 4]}, {MAIN: {0: 2, 1: 4}}),
    ("GPT2", {"num_virtual_tokens": [4, 2], "layers": [1, 0]}, {MAIN: {0: 2, 1: 4}}),
    ("Llama", {"num_virtual_tokens": 3, "layers": [0]}, {MAIN: {0: 3}}),
    ("Llama", {"num_virtual_tokens": [1, 4], "reparameterization": "mlp"}, {MAIN: {0: 1, 1: 4}}),
    ("Bart", {"num_virtual_tokens": [2, 4]}, {ENCODER: {0: 2, 1: 4}, MAIN: {0: 2, 1: 4}, CROSS: {0: 2, 1: 4}}),
    ("Bart", {"num_virtual_tokens": 3, "layers": [1], "decoder": False}, {ENCODER: {1: 3}, CROSS: {1: 3}}),
    ("Bart", {"num_virtual_tokens": [2, 4], "encoder": False, "cross_attention": False}, {MAIN: {0: 2, 1: 4}}),
]


@pytest.mark.parametrize(("name", "options", "lengths"), CASES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CASES)])
def test_it_is_attention_over_prompts_and_tokens_in_the_chosen_layers(name, options, lengths):
    row, ids = ROWS[name], ids_of()
    plain = row.build("written_out")
    _, holder = survey(plain, "prefix")
    for attention in row.attentions:
        model = adapted(row, attention, **options)
        with torch.no_grad():
            for i, parameter in enumerate(model.prompt_encoder.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.5)
        table = model.prompt_encoder["default"]().detach()
        assert model.prompt_encoder["default"].folded is (options.get("reparameterization") != "mlp")
        assert table.shape == (
            sum(n for part in lengths.values() for n in part.values()),
            2 * holder.heads * holder.head_size,
        )
        FRONTS.clear()
        start = 0
        for part in (ENCODER, MAIN, CROSS):
            order = options.get("layers", sorted(lengths.get(part, ())))
            for i in order if part in lengths else ():
                n = lengths[part][i]
                pair = table[start : start + n].view(n, 2, holder.heads, holder.head_size).permute(1, 2, 0, 3)
                FRONTS[id(holder.sites[part][i].module)] = (pair[0], pair[1])
                start += n
        inputs = inputs_of(row, ids)
        inputs["attention_mask"][1, -2:] = 0
        found = logits_of(model, inputs)
        expected = logits_of(shifted(row, plain, lengths), inputs)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        FRONTS.clear()
        assert (found - logits_of(row.build("written_out"), inputs_of(row, ids))).abs().max() > 1e-3


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def shifted(row: Any, model: Any, lengths: dict[str, dict[int, int]]) -> Any:
    """The model with its positions moved up in each stack by the longest prompt there is in it."""
    if row.name == "Llama":
        positions = torch.arange(7) + max(lengths[MAIN].values())
        return lambda **kw: model(**kw, position_ids=positions[None])
    fresh = row.build("written_out").state_dict()
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TABLES:
            part = ENCODER if "encoder.embed_positions" in name else MAIN
            move = max(lengths.get(part, {0: 0}).values())
            module.weight.data = fresh[f"{name}.weight"].roll(-move, 0)
    return model


# -- encoders and what is behind them, from real tokens ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart"])
def test_prompts_of_real_tokens_in_an_encoder_and_in_front_of_it(name):
    row, ids = ROWS[name], ids_of()
    tokens = real_tokens(row.build(), 5).expand(3, -1)
    # In one layer real tokens attend to others as to keys and values that stand in front.
    one = type(row)(row.name, {**row.values, "num_layers": 1, "encoder_layers": 1, "num_decoder_layers": 2}, row.kind)
    model, plain = adapted(one, decoder=False, cross_attention=False, layers=[0]), one.build()
    with torch.no_grad():
        found = model.get_encoder()(input_ids=ids).last_hidden_state
        expected = plain.get_encoder()(input_ids=torch.cat([tokens, ids], 1)).last_hidden_state[:, 5:]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    # To a decoder the encoder's output for prompts looks like that for tokens before those of the input.
    model, plain = adapted(row, encoder=False, decoder=False), row.build()
    with torch.no_grad():
        states = [plain.get_encoder()(input_ids=t).last_hidden_state for t in (tokens, ids)]
        expected = plain(encoder_outputs=BaseModelOutput(torch.cat(states, 1)), decoder_input_ids=ids).logits
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["T5", "Bart", "Llama"])
def test_generation_needs_no_cache_and_no_equal_lengths(name):
    row, ids = ROWS[name], ids_of()
    model = adapted(row, num_virtual_tokens=[2, 4], prompt_init="random")
    model.add_adapter(
        "other", PTuningV2Config(num_virtual_tokens=3, layers=[1], prompt_init="random", task_type=row.task)
    )
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY), found)
    for beams in (1, 3):
        options = {**GREEDY, "num_beams": beams}
        names = ["other", "default", "__base__"]
        batch = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
        for i, each in enumerate(names):
            alone = model.generate(input_ids=ids[i : i + 1], attention_mask=mask[:1], adapter_names=[each], **options)
            assert torch.equal(alone[0], batch[i])


def test_all_parts_of_an_encoder_decoder_learn_under_both_kinds_of_checkpointing():
    row, ids = ROWS["Bart"], ids_of()
    gradients = []
    for checkpointing in (None, True, False):
        model = adapted(row, num_virtual_tokens=[2, 4], reparameterization="mlp", encoder_hidden_size=7).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model(**inputs_of(row, ids)).logits.pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    bias = next(g for n, g in gradients[0].items() if n.endswith("transform.2.bias"))
    assert bias.shape == (6 * 64,) and all(part.abs().max() > 0 for part in bias.view(6, 2, 32)[:, 1])
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-4, rtol=1e-3)


def test_only_what_is_read_is_counted():
    model = adapted(ROWS["Bert"], num_virtual_tokens=[2, 4])
    assert model.prompt_encoder["default"].embedding.weight.numel() == (2 + 4) * 2 * 32
    model = adapted(ROWS["Bert"], layers=[1])
    assert model.prompt_encoder["default"].embedding.weight.numel() == 5 * 2 * 32


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_question_answering_trains_its_head_and_is_loaded_with_it(tmp_path):
    torch.manual_seed(0)
    base = BertForQuestionAnswering(BertConfig(**SHAPE))
    base.save_pretrained(tmp_path / "base")
    base = BertForQuestionAnswering.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PTuningV2Config(task_type="QUESTION_ANS", num_virtual_tokens=5)).eval()
    randomise(model)
    inputs = tiny.BERT.inputs()
    out = model(**inputs, start_positions=torch.tensor([0, 1, 2, 3]), end_positions=torch.tensor([1, 2, 3, 4]))
    out.loss.backward()
    assert {n.rsplit(".", 2)[1] for n, p in model.named_parameters() if p.grad is not None} == {"embedding", "default"}
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model.qa_outputs.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    plain = BertForQuestionAnswering.from_pretrained(tmp_path / "base")
    for read in (
        PeftModel.from_pretrained(plain, tmp_path / "adapter"),
        BertForQuestionAnswering.from_pretrained(tmp_path / "adapter"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(read(**inputs).start_logits, out.start_logits.detach(), atol=1e-6, rtol=1e-5)


def test_transformers_loads_all_parts_of_an_encoder_decoder(tmp_path):
    tiny.T5.build().save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PTuningV2Config("SEQ_2_SEQ_LM", num_virtual_tokens=[2, 4])).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    read = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(read, tiny.T5), logits(model, tiny.T5), atol=1e-5, rtol=1e-5)
    inputs = {k: v for k, v in tiny.T5.inputs().items() if k != "decoder_input_ids"}
    assert torch.equal(read.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


# -- conversion -------------------------------------------------------------------------------------------------------

PLAIN = [tiny.BERT, tiny.GPT2, tiny.LLAMA]
SELF_ONLY = {"encoder": False, "cross_attention": False}


@pytest.mark.parametrize("made", ["none", "mlp"])
@pytest.mark.parametrize("base", PLAIN, ids=lambda b: b.name)
def test_it_becomes_prefix_tuning_and_that_becomes_it(base, made):
    config = PTuningV2Config(task_type=base.task_type, num_virtual_tokens=5, reparameterization=made)
    model = get_peft_model(base.build(), config).eval()
    randomise(model)
    expected = logits(model, base)
    convert_adapter(model, "default", "PREFIX_TUNING", "prefix")
    convert_adapter(model, "prefix", "P_TUNING_V2", "back")
    assert type(model.peft_config["prefix"]) is PrefixTuningConfig
    assert type(model.peft_config["back"]) is PTuningV2Config
    for name in ("prefix", "back"):
        model.set_adapter(name)
        assert torch.equal(logits(model, base), expected)


@carrying
def test_on_every_architecture_it_is_prefix_tuning_where_they_coincide(row):
    model, ids = with_prefix(row, prefix_init="peer"), ids_of()
    expected = logits_of(model, inputs_of(row, ids))
    convert_adapter(model, "default", "P_TUNING_V2", "v2")
    model.set_adapter("v2")
    assert torch.equal(logits_of(model, inputs_of(row, ids)), expected)


@pytest.mark.parametrize("layers", [2, 3])
def test_prefix_tuning_of_an_encoder_decoder_becomes_it(layers):
    model = get_peft_model(
        tiny.T5.build(num_decoder_layers=layers), PrefixTuningConfig("SEQ_2_SEQ_LM", num_virtual_tokens=5)
    ).eval()
    randomise(model)
    expected = logits(model, tiny.T5)
    convert_adapter(model, "default", "P_TUNING_V2", "v2")
    convert_adapter(model, "v2", "PREFIX_TUNING", "back")
    assert model.peft_config["v2"].parts == (MAIN,)
    for name in ("v2", "back"):
        model.set_adapter(name)
        assert torch.equal(logits(model, tiny.T5), expected)


@pytest.mark.parametrize(
    ("base", "options", "reason"),
    [
        (tiny.BERT, {"layers": [1]}, r"layers \[0\] have no virtual tokens"),
        (tiny.BERT, {"num_virtual_tokens": [2, 4]}, r"different numbers of virtual tokens \(\[2, 4\]\)"),
        (tiny.T5, {}, r"in other places \(cross, encoder\)"),
        (tiny.T5, SELF_ONLY, "let layers 0 and 1 of an encoder-decoder with 2 layers share their prefix"),
    ],
)
def test_what_is_no_prefix_tuning_says_why(base, options, reason, tmp_path):
    config = PTuningV2Config(task_type=base.task_type, **{"num_virtual_tokens": 5, **options})
    model = get_peft_model(base.build(), config).eval()
    names, expected = set(dict(model.named_parameters())), logits(model, base)
    with pytest.raises(ValueError, match=reason):
        convert_adapter(model, "default", "PREFIX_TUNING", "prefix")
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained(tmp_path / "out", as_prefix_tuning=True)
    assert not (tmp_path / "out").exists()
    assert set(dict(model.named_parameters())) == names and list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, base), expected)


def test_other_methods_have_no_such_form():
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="type LORA cannot be written as one of type PREFIX_TUNING"):
        convert_adapter(model, "default", "PREFIX_TUNING", "prefix")
    with pytest.raises(ValueError, match="'defalt' not found"):
        convert_adapter(model, "defalt", "PREFIX_TUNING", "prefix")


def test_saved_as_prefix_tuning_it_leaves_no_second_file(tmp_path):
    model = get_peft_model(
        tiny.BERT.build(), PTuningV2Config("SEQ_CLS", num_virtual_tokens=5, reparameterization="mlp")
    ).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_training.safetensors").exists()
    model.save_pretrained(tmp_path, as_prefix_tuning=True)
    assert not (tmp_path / "adapter_training.safetensors").exists()
    read = PeftModel.from_pretrained(tiny.BERT.build(), tmp_path)
    assert type(read.peft_config["default"]) is PrefixTuningConfig
    assert torch.equal(logits(read, tiny.BERT), logits(model, tiny.BERT))


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 1, 1]}, r"`layers` names \[1\] more than once"),
        ({"layers": [-1]}, "counts from 0 on, got -1"),
        ({"layers": []}, "`layers` is empty"),
        ({"layers": [0, 1], "num_virtual_tokens": [5]}, "has 1 lengths, but `layers` names 2 layers"),
        ({"reparameterization": "lstm"}, "Use one of none, embedding, mlp"),
        ({"reparameterization": "mpl"}, "did you mean 'mlp'"),
        ({"prompt_init": "peer"}, "'tokens' or 'random', got 'peer'"),
        ({"encoder": False, "decoder": False, "cross_attention": False}, "are all False"),
        ({"layers": "0"}, "`layers` should be a list of integers"),
        ({"encoder": "yes"}, "`encoder` should be True or False"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        PTuningV2Config(**{"num_virtual_tokens": 5, **options})


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (tiny.BERT, {"layers": [1, 2]}, r"names \[2\], but the encoder has 2 layers, 0 to 1"),
        (tiny.LLAMA, {"layers": [7]}, r"names \[7\], but the decoder has 2 layers"),
        (tiny.T5, {"layers": [2]}, r"the encoder has 2 layers, 0 to 1\. Name some of these, or switch `encoder` off"),
        (tiny.BERT, {"num_virtual_tokens": [3, 3, 3]}, "has 3 lengths, but the encoder has 2 layers"),
        (tiny.LLAMA, {"encoder": True}, "`encoder` is True, but the model is a decoder alone.*Leave `encoder` out"),
        (tiny.LLAMA, {"cross_attention": True}, "`cross_attention` is True, but the model is a decoder alone"),
        (tiny.BERT, {"decoder": True}, "`decoder` is True, but the model is an encoder alone"),
        (tiny.LLAMA, {"decoder": False}, "`decoder` is False, and the model is a decoder alone: nothing would be left"),
        (tiny.BERT, {"encoder": False, "decoder": False}, "nothing would be left to train"),
        (tiny.BERT, {"num_virtual_tokens": [3, 0]}, "from 1 on, got 0"),
        (tiny.BERT, {"num_virtual_tokens": [3, 64]}, "has only 64 positions"),
    ],
)
def test_what_does_not_suit_a_model(base, options, message):
    model = base.build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PTuningV2Config(task_type=base.task_type, **{"num_virtual_tokens": 5, **options}))
    assert list(model.state_dict()) == keys and not hasattr(model, "peft_config")
