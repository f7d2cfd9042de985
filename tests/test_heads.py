"""Classification heads: as many labels as the adapter was trained with, whatever the base model comes with."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

import tiny
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from settings import logits, randomise


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
