"""CPT: which embeddings of a context change and how far, the loss of labels, its files, and wrong input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

import tiny
from peft import CPTConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from settings import logits

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 44]
KINDS = [0, 1, 2, 3, 4, 5, 6, 7, 8]
TRAINED = [i for i, kind in enumerate(KINDS) if kind % 4]
both = pytest.mark.parametrize("base", [tiny.LLAMA, tiny.GPT2], ids=lambda b: b.name)


def config(**options) -> CPTConfig:
    return CPTConfig(**{"task_type": "CAUSAL_LM", "cpt_token_ids": IDS, "cpt_tokens_type_mask": KINDS, **options})


def model_of(base=tiny.LLAMA, **options) -> PeftModel:
    return get_peft_model(base.build(), config(**options)).eval()


def batch(base=tiny.LLAMA):
    inputs = base.inputs()
    return {**inputs, "labels": inputs["input_ids"].clone()}


def train(model, steps=3, base=tiny.LLAMA, **inputs):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**batch(base), **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@both
def test_it_starts_as_the_context_and_the_contexts_labels_count(base):
    """Fresh, it is the base model behind the context."""
    model, inputs = model_of(base), batch(base)
    ids = torch.cat([torch.tensor(IDS).expand(len(inputs["input_ids"]), -1), inputs["input_ids"]], dim=1)
    with torch.no_grad():
        found, whole = model(**inputs), base.build().eval()(input_ids=ids).logits
    torch.testing.assert_close(found.logits, whole, atol=1e-5, rtol=1e-4)
    counted = torch.cat(
        [ids[:, :9].masked_fill(torch.tensor([k not in (4, 8) for k in KINDS]), -100), ids[:, 9:]], dim=1
    )
    wanted = F.cross_entropy(whole[:, :-1].flatten(0, 1), counted[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)


def test_changes_stay_within_bounds_and_instructions_and_labels_do_not_change():
    model = model_of(opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.1)
    words = model.get_base_model().get_input_embeddings().weight.detach()
    losses = train(model, 8)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        change = (model.prompt_encoder["default"]() - words[IDS]).norm(dim=1)
    scale = (words.shape[1] / 2048) ** 0.5
    bounds = torch.tensor([{0: 0.0, 2: 0.4}.get(k % 4, 0.1) * scale for k in KINDS])
    assert (change <= bounds * 1.001 + 1e-7).all()
    assert (change[TRAINED] > 0.5 * bounds[TRAINED]).all()
    assert not change[[0, 4, 8]].any()


def test_each_step_goes_on_from_the_bounded_changes():
    """The optimiser sees parameters within their bounds, not only outputs that were."""
    model = model_of()
    delta = model.prompt_encoder["default"].delta_embedding.weight
    with torch.no_grad():
        delta.fill_(5.0)
        logits(model, tiny.LLAMA)
        assert (delta == 5.0).all()  # using it changes nothing
    model(**batch()).loss.backward()
    assert delta.norm(dim=1).max() < 0.1 * (delta.shape[1] / 2048) ** 0.5 * 1.001
    assert delta.grad[TRAINED].any(dim=1).all() and not delta.grad[[0, 4, 8]].any()


def test_kinds_of_the_input_and_decay():
    model = model_of(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    inputs = batch()
    kinds = torch.tensor([[0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 7, 8]]).repeat(2, 1)
    inputs["labels"][0, 5] = -100
    with torch.no_grad():
        out = model(**inputs, input_type_mask=kinds)
        plain = model(**{k: v for k, v in inputs.items() if k != "labels"}, input_type_mask=kinds)
    assert plain.loss is None and torch.equal(plain.logits, out.logits)
    terms = []
    for line in range(4):
        counted = [(i, k // 4, IDS[i]) for i, k in enumerate(KINDS) if k in (4, 8)]
        counted += [
            (9 + i, 2 + int(k) // 4, int(inputs["labels"][line, i]))
            for i, k in enumerate(kinds[line])
            if k and k % 4 == 0
        ]
        last = max(example for _, example, _ in counted)
        for place, example, token in counted:
            if token != -100:
                surprise = -out.logits[line, place - 1].log_softmax(-1)[token]
                terms.append(0.5 ** (last - example) * surprise)
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())


def test_kinds_that_end_within_an_example_count_the_inputs_labels():
    """Also the default, all kinds 1, where the field's common library counts none and gives NaN."""
    inputs = batch()
    for kinds in (None, [1] * 9, [0, 1, 1, 2, 2, 3, 3, 3, 3]):
        with torch.no_grad():
            out = model_of(cpt_tokens_type_mask=kinds)(**inputs)
        wanted = F.cross_entropy(out.logits[:, 8:-1].flatten(0, 1), inputs["labels"].flatten())
        torch.testing.assert_close(out.loss, wanted)


def test_what_a_trainer_passes():
    model, inputs = model_of(), batch()
    inputs["labels"][0, :2] = -100
    with torch.no_grad():
        loss = model(**inputs).loss
        part = model(**inputs, num_items_in_batch=torch.tensor(44)).loss
        as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(part, loss * 22 / 44)
    assert torch.equal(as_tuple[0], loss) and as_tuple[1].shape[1] == 9 + 6
    assert list(model(**inputs).keys())[:2] == ["loss", "logits"]
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, tiny.LLAMA.build().eval()(**inputs).loss)


def test_training_goes_on_from_either_file(tmp_path):
    whole, model = model_of(), model_of()
    straight = train(whole, 6)
    begun = train(model, 3)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    expected = logits(model, tiny.LLAMA)
    used = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path)
    assert torch.equal(logits(used, tiny.LLAMA), expected)
    assert torch.equal(used(**batch()).loss, model(**batch()).loss)
    read = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path, is_trainable=True)
    assert begun + train(read, 3) == pytest.approx(straight, abs=1e-3)  # the optimiser is new
    (tmp_path / "adapter_training.safetensors").unlink()  # as the field's common library writes it
    read = PeftModel.from_pretrained(tiny.LLAMA.build(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(read, tiny.LLAMA), expected, atol=1e-6, rtol=1e-5)
    table = read.prompt_encoder["default"]
    torch.testing.assert_close(
        table.delta_embedding.weight[TRAINED],
        model.prompt_encoder["default"]()[TRAINED] - table.embedding.weight[TRAINED],
    )
    with pytest.warns(UserWarning, match="moved within its bounds"):
        model_of(opt_projection_epsilon=1e-4).load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "causal language models"),
        ({"num_virtual_tokens": 5}, "`num_virtual_tokens` is 5, but `cpt_token_ids` has 9"),
        ({"cpt_tokens_type_mask": [1, 2]}, "`cpt_tokens_type_mask` has 2 numbers"),
        ({"cpt_tokens_type_mask": [-1] * 9}, "from 0 on"),
        ({"cpt_mask": [1] * 4}, "`cpt_mask` has 4 numbers"),
        ({"cpt_token_ids": []}, "at least one"),
        ({"opt_weighted_loss_type": "decoy"}, "Did you mean 'decay'"),
        ({"opt_loss_decay_factor": -1.0}, "`opt_loss_decay_factor`"),
        ({"opt_projection_epsilon": None}, "`opt_projection_epsilon`"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_mask_that_has_no_effect_is_said():
    with pytest.warns(UserWarning, match="`cpt_mask` has no effect"):
        config(cpt_mask=[1] * 8 + [0])


def test_a_decoder_with_another_head_is_refused():
    with pytest.raises(ValueError, match="this model is none"):
        inject_adapter_in_model(config(), LlamaForSequenceClassification(tiny.LLAMA.build().config))


def test_wrong_use():
    for base, options, message in (
        (tiny.BERT, {}, "this model is none"),
        (tiny.T5, {}, "this model is none"),
        (tiny.LLAMA, {"cpt_token_ids": None, "cpt_tokens_type_mask": None}, "give `cpt_token_ids`"),
        (tiny.LLAMA, {"cpt_token_ids": [tiny.VOCAB] * 9}, f"knows only {tiny.VOCAB} tokens"),
        (tiny.GPT2, {"cpt_token_ids": [3] * 300, "cpt_tokens_type_mask": None}, "positions"),
    ):
        with pytest.raises(ValueError, match=message):
            inject_adapter_in_model(config(**options), base.build())
    model, inputs = model_of(), batch()
    with pytest.raises(ValueError, match="`input_type_mask` has shape"):
        model(**inputs, input_type_mask=torch.ones(4, 3))
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.add_adapter("plain", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    rows = ["default", "lora", "plain", "default"]
    with pytest.raises(ValueError, match="loss of adapter 'default' is of a kind of its own"):
        model(**inputs, adapter_names=rows)
    inputs.pop("labels")
    assert model(**inputs, adapter_names=rows).logits.shape[1] == 6
