"""One table of architectures: which carry prefixes and virtual tokens, checked against the plain model reading real tokens.

A decoder that starts with the keys and values of real tokens has to compute what the plain model computes behind these tokens, and a
model whose virtual tokens are the embeddings of real ones what it computes for these tokens and the input. No other library is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.core.prompt_tuner import survey
from peft.core.tokens import real_tokens

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
BERT_LIKE = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
BART_LIKE = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5_LIKE = {
    "vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """An architecture.

    Args:
        name: Its class in transformers up to the task, and its name in test ids.
        values: Its configuration.
        kind: ``encoder``, ``decoder`` or ``encoder-decoder``.
        no_prefix: Why it carries no prefix, as a pattern for the message.
        attentions: The implementations to try.
    """

    name: str
    values: dict[str, Any] = field(hash=False)
    kind: str
    no_prefix: str | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager")

    @property
    def task(self) -> str:
        return {"encoder": "SEQ_CLS", "decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}[self.kind]

    def build(self, attention: str | None = None) -> Any:
        torch.manual_seed(0)
        suffix = {
            "encoder": "ForSequenceClassification",
            "decoder": "ForCausalLM",
            "encoder-decoder": "ForConditionalGeneration",
        }
        cls = getattr(transformers, self.name + suffix[self.kind], None) or getattr(
            transformers, self.name + "LMHeadModel"
        )
        config = cls.config_class(**self.values, attn_implementation=attention or self.attentions[0])
        return cls(config).eval()


NO_INTERFACE = "attention interface"
TABLE = (
    Row("Bert", BERT_LIKE, "encoder"),
    Row("Roberta", BERT_LIKE, "encoder"),
    Row("DistilBert", {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40,
                       "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 0}, "encoder"),
    Row("DebertaV2", {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        "encoder", NO_INTERFACE, ("eager",)),
    Row("ModernBert", {**SMALL, "num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 8, "cls_token_id": 1,
                       "sep_token_id": 2}, "encoder"),
    Row("Electra", {**BERT_LIKE, "embedding_size": 24}, "encoder"),
    Row("GPT2", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                 "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "decoder"),
    Row("OPT", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, "decoder"),
    Row("Bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "pad_token_id": 0,
                  "bos_token_id": 1, "eos_token_id": 2}, "decoder", None, ("eager",)),
    Row("GPTNeoX", SMALL, "decoder"),
    Row("Llama", GROUPED, "decoder"),
    Row("Mistral", {**GROUPED, "sliding_window": 24}, "decoder"),
    Row("Qwen2", GROUPED, "decoder"),
    Row("Qwen3", {**GROUPED, "head_dim": 16}, "decoder"),
    Row("Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}, "decoder", None, ("eager",)),
    Row("Gemma3", {**GROUPED, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16,
                   "layer_types": ["sliding_attention", "full_attention"]}, "decoder"),
    Row("Phi", {**GROUPED, "resid_pdrop": 0.0}, "decoder"),
    Row("T5", T5_LIKE, "encoder-decoder"),
    Row("MT5", T5_LIKE, "encoder-decoder"),
    Row("Bart", BART_LIKE, "encoder-decoder"),
    Row("MBart", BART_LIKE, "encoder-decoder"),
)  # fmt: skip
P, LENGTH = 5, 7
NARROW = tuple(
    Row(r.name, {**r.values, "sliding_window": 6}, r.kind, None, r.attentions)
    for r in TABLE
    if "sliding_window" in r.values
)
"""Windows shorter than virtual tokens and input together."""


def name_of(row: Row) -> str:
    return row.name + ("-narrow" if row in NARROW else "")


every_row = pytest.mark.parametrize("row", TABLE, ids=lambda r: r.name)
carrying = pytest.mark.parametrize("row", [r for r in TABLE if r.no_prefix is None], ids=lambda r: r.name)
generating = pytest.mark.parametrize("row", [*(r for r in TABLE if r.kind != "encoder"), *NARROW], ids=name_of)
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def ids_of(rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def inputs_of(row: Row, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**given, "decoder_input_ids": ids} if row.kind == "encoder-decoder" else given


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def with_prefix(row: Row, attention: str | None = None, **options: Any) -> Any:
    return get_peft_model(
        row.build(attention), PrefixTuningConfig(task_type=row.task, num_virtual_tokens=P, **options)
    ).eval()


def with_real_tokens(row: Row, attention: str | None = None) -> tuple[Any, torch.Tensor]:
    """A model whose virtual tokens are the embeddings of real ones, and these."""
    config = PromptTuningConfig(task_type=row.task, num_virtual_tokens=P, num_transformer_submodules=1)
    model = get_peft_model(row.build(attention), config).eval()
    tokens = ids_of(9)[:1, :P] * 0 + torch.randint(3, 60, (1, P), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        table = model.get_base_model().get_input_embeddings()(tokens[0])
        model.prompt_encoder["default"].embedding.weight.copy_(table)
    return model, tokens


@every_row
def test_what_cannot_carry_a_prefix_says_so_and_stays_as_it_was(row: Row) -> None:
    if row.no_prefix is None:
        assert with_prefix(row).get_nb_trainable_parameters()[0] > 0
        return
    model = row.build()
    keys = [(n, type(m), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    with pytest.raises(NotImplementedError, match=row.no_prefix):
        get_peft_model(model, PrefixTuningConfig(task_type=row.task, num_virtual_tokens=P))
    assert [(n, type(m), len(m._forward_pre_hooks)) for n, m in model.named_modules()] == keys
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


@carrying
def test_a_prefix_of_real_tokens_is_what_the_model_computes_behind_them(row: Row) -> None:
    for attention in row.attentions:
        model, ids = with_prefix(row, attention), ids_of()
        plain = row.build(attention)
        found = logits(model, **inputs_of(row, ids))
        if (
            row.kind == "encoder"
        ):  # tokens see what stands behind them there, so the two differ; but not between kernels
            torch.testing.assert_close(found, logits(with_prefix(row, row.attentions[-1]), **inputs_of(row, ids)))
            assert (found - logits(plain, **inputs_of(row, ids))).abs().max() > 1e-4
            continue
        tokens = real_tokens(plain, P).expand(3, -1)
        longer = torch.cat([tokens, ids], dim=1)
        inputs = inputs_of(row, ids)
        if row.kind == "decoder":
            inputs = inputs_of(row, longer)
        else:
            # The prefix was recorded while the encoder read the same tokens; only the first layer's keys do not depend on that.
            inputs = {**inputs_of(row, ids), "decoder_input_ids": longer}
        expected = logits(plain, **inputs)[:, P:]
        if row.kind == "decoder":
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        else:
            first_layer_only(row, attention, ids, longer)


def first_layer_only(row: Row, attention: str, ids: torch.Tensor, longer: torch.Tensor) -> None:
    """The same with a decoder of one layer, whose keys and values do not depend on the encoder."""
    one = Row(row.name, {**row.values, "num_decoder_layers": 1, "decoder_layers": 1}, row.kind)
    model, plain = with_prefix(one, attention), one.build(attention)
    found = logits(model, **inputs_of(one, ids))
    expected = logits(plain, **{**inputs_of(one, ids), "decoder_input_ids": longer})[:, P:]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@every_row
def test_virtual_tokens_that_are_real_embeddings_are_real_tokens(row: Row) -> None:
    for attention in row.attentions:
        model, tokens = with_real_tokens(row, attention)
        plain, ids = row.build(attention), ids_of()
        longer = torch.cat([tokens.expand(3, -1), ids], dim=1)
        expected = logits(
            plain, **{**inputs_of(row, longer), **({"decoder_input_ids": ids} if row.task == "SEQ_2_SEQ_LM" else {})}
        )
        torch.testing.assert_close(logits(model, **inputs_of(row, ids)), expected, atol=2e-5, rtol=1e-4)


@generating
def test_generation_with_virtual_tokens_is_generation_behind_real_ones(row: Row) -> None:
    model, tokens = with_real_tokens(row)
    plain, ids = row.build(), ids_of()
    mask = torch.ones_like(ids)
    longer = torch.cat([tokens.expand(3, -1), ids], dim=1)
    if row.kind == "decoder":  # the tokens stand behind the padding at the left
        mask[1, :3] = 0
        longer[1] = torch.cat([ids[1, :3] * 0, tokens[0], ids[1, 3:]])
        ids = ids.masked_fill(mask == 0, 0)
    expected = plain.generate(input_ids=longer, attention_mask=(longer != 0).long(), **GREEDY)
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    found = model.generate(**given)
    assert torch.equal(found[:, -5:], expected[:, -5:])
    assert torch.equal(model.generate(**given, use_cache=False), found)
    if row.kind == "decoder":
        assert torch.equal(model.generate(**given, cache_implementation="static"), found)


def test_rows_with_virtual_tokens_leave_a_narrow_window_each_at_its_own_length() -> None:
    row = next(r for r in NARROW if r.name == "Gemma3")
    model, _ = with_real_tokens(row)
    for name, config in {
        "short": PromptTuningConfig(task_type=row.task, num_virtual_tokens=2),
        "prefix": PrefixTuningConfig(task_type=row.task, num_virtual_tokens=3, prefix_init="peer"),
    }.items():
        model.add_adapter(name, config)
    names, ids = ["short", "prefix", "default", "__base__"], ids_of(4)
    given = {"attention_mask": torch.ones_like(ids), **GREEDY}
    for use_cache in (True, False):
        found = model.generate(input_ids=ids, adapter_names=names, use_cache=use_cache, **given)
        for i, name in enumerate(names):
            alone = {"attention_mask": given["attention_mask"][:1], **GREEDY}
            one = model.generate(input_ids=ids[i : i + 1], adapter_names=[name], **alone)
            assert torch.equal(one[0], found[i]), (name, use_cache)
    model.set_adapter(["prefix", "default"])
    assert torch.equal(model.generate(input_ids=ids, **given), model.generate(input_ids=ids, use_cache=False, **given))


@pytest.mark.parametrize(
    "row", [r for r in (*TABLE, *NARROW) if r.kind != "encoder" and r.no_prefix is None], ids=name_of
)
def test_generation_with_a_prefix_needs_no_cache_and_no_equal_lengths(row: Row) -> None:
    model, ids = with_prefix(row, prefix_init="peer"), ids_of()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    if row.kind == "encoder-decoder":
        mask[1] = mask[1].flip(0)
    ids = ids.masked_fill(mask == 0, 0)
    found = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY), found)
    short = ids[1:2, :-2] if row.kind == "encoder-decoder" else ids[1:2, 2:]
    assert torch.equal(
        model.generate(input_ids=short, attention_mask=torch.ones_like(short), **GREEDY)[0, -5:], found[1, -5:]
    )
    if row.kind == "decoder":
        static = model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        assert torch.equal(static, found)
    beams = {**GREEDY, "num_beams": 3}
    batch = model.generate(input_ids=ids, attention_mask=mask, **beams)
    assert torch.equal(batch[:1], model.generate(input_ids=ids[:1], attention_mask=mask[:1], **beams))


@pytest.mark.parametrize("row", [r for r in TABLE if r.name in ("Gemma3", "T5", "Bart")], ids=name_of)
def test_compile_without_graph_breaks(row: Row) -> None:
    """The families whose attention differs from that of the models that every promise is checked on."""
    torch._dynamo.reset()
    model, inputs = with_prefix(row, prefix_init="peer"), inputs_of(row, ids_of())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), atol=1e-5, rtol=1e-5)


def flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple[Any, None]:
    """What flash kernels compute: causal and windowed from the last key on, padding taken out, with no other mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys = query.shape[2], key.shape[2]
    real = torch.ones(len(key), keys, dtype=torch.long) if attention_mask is None else attention_mask.long()
    place = real.cumsum(-1)
    distance = place[:, keys - queries :, None] - place[:, None]
    seen = (distance >= 0) & real.bool()[:, None]
    seen &= torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    if options.get("sliding_window") is not None:
        seen &= distance < options["sliding_window"]
    scores = query @ key.transpose(2, 3) * options["scaling"]
    weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("row", [r for r in (*TABLE, *NARROW) if r.name in ("Llama", "Mistral", "Gemma3")], ids=name_of)
def test_flash_attention_does_the_same_or_says_why_not(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    for make in (with_prefix, lambda row: with_real_tokens(row)[0]):
        model = make(row)
        expected = model.generate(**given, **GREEDY)
        with torch.no_grad():
            whole = model(input_ids=ids).logits
        model.config._attn_implementation_internal = "flash_attention_2"
        if row in NARROW and make is with_prefix:
            with pytest.raises(NotImplementedError, match="attn_implementation='sdpa'"):
                model(**given)
            continue
        assert torch.equal(model.generate(**given, **GREEDY), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, whole, atol=2e-5, rtol=1e-4)


@every_row
def test_disabled_adapters_leave_the_plain_model(row: Row) -> None:
    ids = ids_of()
    expected = logits(row.build(), **inputs_of(row, ids))
    for model in (with_real_tokens(row)[0], *([] if row.no_prefix else [with_prefix(row)])):
        with model.disable_adapter():
            assert torch.equal(logits(model, **inputs_of(row, ids)), expected)
        assert not torch.equal(logits(model, **inputs_of(row, ids)).flatten()[:3], expected.flatten()[:3])
        assert torch.equal(logits(model.unload(), **inputs_of(row, ids)), expected)


def test_the_geometry_is_that_of_the_layers() -> None:
    row = next(r for r in TABLE if r.name == "Gemma3")
    geometry, _ = survey(row.build(), "prefix")
    assert (geometry.layers, geometry.heads, geometry.head_size, geometry.stacks) == (2, 2, 16, 1)
