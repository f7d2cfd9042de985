"""Classification heads: as many labels as the adapter was trained with, whatever the base model comes with."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

import tiny
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from settings import logits, randomise
from test_prompt_architectures import TABLE


@pytest.fixture
def headless(tmp_path):
    torch.manual_seed(0)
    BertModel(tiny.BERT.build().config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base_folder, out, labels):
    names = {i: f"class {i}" for i in range(labels)}
    model = BertForSequenceClassification.from_pretrained(base_folder, num_labels=labels, id2label=names)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])).eval()
    randomise(model)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize(
    "load",
    [
        lambda base, folder: AutoModelForSequenceClassification.from_pretrained(folder),
        lambda base, folder: BertForSequenceClassification.from_pretrained(folder),
        lambda base, folder: PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), folder),
        lambda base, folder: AutoPeftModelForSequenceClassification.from_pretrained(folder),
    ],
    ids=["transformers-auto", "transformers", "holder-on-two-labels", "auto-holder"],
)
def test_labels_come_from_the_adapter(headless, tmp_path, labels, load):
    expected = trained(headless, tmp_path / "adapter", labels)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["num_labels"] == labels
    model = load(headless, tmp_path / "adapter").eval()
    assert torch.equal(logits(model, tiny.BERT), logits(expected, tiny.BERT))
    assert model.config.num_labels == labels
    assert model.config.id2label[labels - 1] == (f"class {labels - 1}")
    loss = model(**tiny.BERT.inputs(), labels=torch.tensor([0, 1, labels - 1, 0])).loss
    assert loss.isfinite()


def test_a_trained_head_of_another_size_is_not_thrown_away(headless, tmp_path):
    trained(headless, tmp_path / "adapter", 5)
    BertForSequenceClassification.from_pretrained(headless, num_labels=3).save_pretrained(tmp_path / "with-head")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "with-head")
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match="trained with 5 labels, but the head 'classifier' of this model has 3.*num_labels=5"
    ):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert list(model.state_dict()) == keys
    assert model.config.num_labels == 3


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize(("kind", "part"), [("ModernBert", "head"), ("DebertaV2", "pooler")])
def test_parts_of_a_new_head_beside_the_classifier_are_trained_and_saved(kind, part, method, tmp_path):
    values = next(row.values for row in TABLE if row.name == kind)
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in values.items() if k != "num_labels"})
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "base")
    cls = getattr(transformers, f"{kind}ForSequenceClassification")
    configs = {
        "lora": LoraConfig(task_type="SEQ_CLS", target_modules=[{"head": "Wqkv", "pooler": "query_proj"}[part]]),
        "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    }
    model = get_peft_model(cls.from_pretrained(tmp_path / "base", num_labels=5), configs[method]).eval()
    assert model.peft_config["default"].modules_to_save == ["classifier", "score", part]
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, tiny.BERT)
    for read in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base", num_labels=5), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits(read, tiny.BERT), expected, atol=1e-6, rtol=1e-5)

    # A head that comes with the base stays as it is, but for the classifier.
    cls.from_pretrained(tmp_path / "base", num_labels=5).save_pretrained(tmp_path / "whole")
    configs[method].modules_to_save = None
    model = get_peft_model(cls.from_pretrained(tmp_path / "whole"), configs[method])
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_files_without_the_record_still_load(headless, tmp_path):
    expected = trained(headless, tmp_path / "adapter", 2)
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    for key in ("num_labels", "id2label", "problem_type"):
        values.pop(key, None)
    path.write_text(json.dumps(values))
    model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(headless), tmp_path / "adapter")
    assert torch.equal(logits(model, tiny.BERT), logits(expected, tiny.BERT))


def test_adapters_without_a_head_record_nothing(tmp_path):
    model = get_peft_model(tiny.LLAMA.build(), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert "num_labels" not in json.loads((tmp_path / "adapter_config.json").read_text())
